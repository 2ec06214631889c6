"""Conversion of decisions and budget statuses to the node's own messages, PolicyStep and BudgetStatus."""

from __future__ import annotations

import math

from deer_vla_ros import msg
from deer_vla_ros.budget.types import AVERAGES, PEAKS, BudgetStatus
from deer_vla_ros.control.types import Decision
from deer_vla_ros.inference.types import StopReason
from deer_vla_ros.ros.messages import stamp

STOP_REASONS = {
    StopReason.AGREED: msg.PolicyStep.STOP_AGREED,
    StopReason.DEEPEST: msg.PolicyStep.STOP_DEEPEST,
    StopReason.STAGE: msg.PolicyStep.STOP_STAGE,
}


def step_message(decision: Decision, frame_id: str, published_ns: int) -> msg.PolicyStep:
    """A decision as a `~/step` message. published_ns: when its command was published [ns, ROS time]."""
    policy, action, times, cost = (
        decision.policy,
        decision.policy.action,
        decision.policy.times,
        decision.cost,
    )
    verdict = msg.PolicyStep.VERDICT_ACCEPTED
    if decision.limits:
        verdict = msg.PolicyStep.VERDICT_LIMITED
    if decision.held:
        verdict = msg.PolicyStep.VERDICT_HELD
    message = msg.PolicyStep(
        step=decision.step,
        episode=decision.episode,
        episode_step=decision.episode_step,
        instruction=decision.instruction,
        stop_reason=STOP_REASONS[policy.stop],
        exit_index=policy.exit_index,
        layers_run=policy.layers_run,
        exit_layers=policy.exits,
        deltas=policy.deltas,
        thresholds=policy.thresholds,
        budget_id=decision.budget_id,
        tokens=policy.tokens,
        language_gmac=cost.language_gmac,
        language_gmac_full=cost.language_gmac_full,
        total_gmac=cost.total_gmac,
        preprocess_ms=times.preprocess,
        vision_ms=times.vision,
        language_ms=times.language,
        head_ms=times.head,
        total_ms=times.total,
        stamp_to_publish_ms=milliseconds(published_ns - decision.stamp_ns),
        static_stamp=stamp(decision.static_stamp_ns),
        gripper_stamp=stamp(decision.gripper_stamp_ns),
        pose_stamp=stamp(decision.pose_stamp_ns),
        static_age_ms=milliseconds(decision.age_ns(decision.static_stamp_ns)),
        gripper_age_ms=milliseconds(decision.age_ns(decision.gripper_stamp_ns)),
        pose_age_ms=milliseconds(decision.age_ns(decision.pose_stamp_ns)),
        skew_ms=milliseconds(decision.skew_ns),
        action=action.pose,
        gripper_probability=action.gripper_probability,
        verdict=verdict,
        reasons=[reason.name for reason in (*decision.limits, *decision.held)],
    )
    message.header.frame_id, message.header.stamp = frame_id, stamp(decision.stamp_ns)
    return message


def budget_message(status: BudgetStatus, now_ns: int) -> msg.BudgetStatus:
    """A budget's status as a `~/budget` message."""
    asked, done = status.requested, status.achieved
    unknown = (math.nan, math.nan)
    message = msg.BudgetStatus(
        budget_id=status.budget_id,
        tokens=status.tokens,
        governor=asked.governor,
        binding=status.binding,
        clamped=status.clamped,
        exit_layers=status.rule.exits,
        thresholds=status.rule.thresholds,
        deepest_exit_layer=status.rule.deepest,
        expected_gmac=status.expected_gmac,
        expected_ms=status.expected_ms,
        correction=status.correction,
        notes=status.notes,
        achieved_steps=done.steps,
        achieved_mean_gmac=done.gmac,
        achieved_mean_fraction=done.fraction,
        achieved_mean_ms=done.ms,
        recent_mean_gmac=done.recent_gmac,
        recent_mean_ms=done.recent_ms,
        deadline_misses=done.deadline_misses,
        recent_miss_rate=done.recent_miss_rate,
        resident_layers=status.resident_layers,
        resident_gib=status.resident_gib,
        device_gib=status.device_gib,
    )
    for name in (*AVERAGES, *PEAKS):
        setattr(message, f"requested_{name}", getattr(asked, name))
    for unit, name in (
        ("gmac", "peak_gmac"),
        ("gib", "memory_gib"),
        ("ms", "average_ms"),
        ("deadline_ms", "deadline_ms"),
    ):
        low, high = status.feasible.get(name, unknown)
        setattr(message, f"feasible_min_{unit}", low)
        setattr(message, f"feasible_max_{unit}", high)
    message.header.stamp = stamp(now_ns)
    return message


def milliseconds(nanoseconds: int) -> float:
    return nanoseconds / 1e6
