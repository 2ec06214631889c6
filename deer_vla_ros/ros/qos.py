"""The qualities of service of topics and services."""

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

NEWEST = QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT)
"""For sensor data: receives from best-effort and reliable publishers, and keeps only the newest message."""
LATCHED = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)
"""For state that a late subscriber needs: the subscriber gets the newest message when it starts."""
SERVICES = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
"""Up to 1000 requests can wait. With the usual queue of 10, some of a flood of requests are lost."""
