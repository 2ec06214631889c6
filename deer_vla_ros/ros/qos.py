"""Qualities of service of topics and services."""

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

NEWEST = QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT)
"""For sensor data: hears best-effort and reliable publishers, and keeps nothing but the newest."""
LATCHED = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)
"""For what a late subscriber still has to hear: the newest message waits for it."""
SERVICES = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
"""So many requests wait for their answer: with the usual ten, those of a flood are lost without one."""
