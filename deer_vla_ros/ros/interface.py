"""The node's topics and services, for `docs/reference`. A test compares them with the running node."""

from __future__ import annotations

from dataclasses import dataclass

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger

from deer_vla_ros.msg import BudgetStatus, PolicyStep


@dataclass(frozen=True)
class Topic:
    """A topic of the node. name: relative; `~` is the node's name. quality: of service, in words.

    when: the parameter value that the topic depends on, or empty.
    """

    name: str
    type: type
    quality: str
    meaning: str
    when: str = ""


@dataclass(frozen=True)
class Service:
    """A service of the node. name: relative; `~` is the node's name."""

    name: str
    type: type
    meaning: str


SENSOR = "best effort, depth 1: hears reliable and best-effort publishers, newest wins"
RELIABLE = "reliable"
RAW, COMPRESSED = "inputs.image_transport: raw", "inputs.image_transport: compressed"

INPUTS = (
    Topic("camera/static/image_raw", Image, SENSOR, "Static camera.", RAW),
    Topic("camera/gripper/image_raw", Image, SENSOR, "Camera on the gripper.", RAW),
    Topic(
        "camera/static/image_raw/compressed",
        CompressedImage,
        SENSOR,
        "Static camera, JPEG or PNG.",
        COMPRESSED,
    ),
    Topic(
        "camera/gripper/image_raw/compressed",
        CompressedImage,
        SENSOR,
        "Camera on the gripper, JPEG or PNG.",
        COMPRESSED,
    ),
    Topic(
        "instruction",
        String,
        "reliable, heard from latched and from plain publishers",
        "A new text starts a new episode, the same text does not, an empty text (or only spaces) means hold.",
    ),
    Topic(
        "ee_pose",
        PoseStamped,
        SENSOR,
        "Measured TCP pose in the action frame; without a fresh one the arm holds.",
    ),
    Topic(
        "enable",
        Bool,
        RELIABLE,
        "A deadman switch: the arm holds unless it says true and is refreshed.",
        "control.enable_timeout_s above 0",
    ),
)
OUTPUTS = (
    Topic(
        "target_pose",
        PoseStamped,
        RELIABLE,
        "Absolute TCP target in the action frame, stamped like the newest camera frame used. "
        "While holding: the pose measured when the hold began, taken anew when the arm is moved by more than "
        "a step; nothing while no usable pose is measured.",
        "action.mode: pose or both",
    ),
    Topic(
        "target_twist",
        TwistStamped,
        RELIABLE,
        "The same step as a velocity, along the axes of the action frame. While holding: zero.",
        "action.mode: twist or both",
    ),
    Topic(
        "gripper_command",
        Float64MultiArray,
        RELIABLE,
        "One value: the action space's for open or for closed. While holding: the last one, repeated.",
        "action.gripper_interface: topic",
    ),
    Topic("~/step", PolicyStep, RELIABLE, "One per inference."),
    Topic(
        "~/budget",
        BudgetStatus,
        "reliable, transient local: a late subscriber gets the newest",
        "Every second and on every change.",
    ),
    Topic(
        "~/overlay",
        Image,
        RELIABLE,
        "What the policy sees and how deep it thinks, as a picture; drawn only while somebody subscribes.",
        "overlay.rate_hz above 0",
    ),
    Topic(
        "/diagnostics",
        DiagnosticArray,
        RELIABLE,
        "1 Hz: state, rate, latency, holds by reason, drops, publishers per input.",
    ),
)
SERVICES = (
    Service("~/reset", Trigger, "Clears the temporal state: the next step starts a new episode."),
    Service(
        "~/hold",
        SetBool,
        "true holds; false lets go of a hold that was requested here, and of one that a person has to clear.",
    ),
)
