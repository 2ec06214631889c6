"""A robot as the policy node sees it: cameras and a measured pose over real DDS, which can misbehave."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator

import numpy as np
from deer_vla_ros.msg import BudgetStatus, PolicyStep
from geometry_msgs.msg import PoseStamped, TwistStamped
from harness import Client, wait_until
from PIL import Image as Picture
from rclpy.duration import Duration
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Float64MultiArray, String

from deer_vla_ros.ros.qos import LATCHED

PERIOD_S = 0.1


class Rig:
    """Publishes at 10 Hz while `running()`, and keeps all messages of the node. Change its attributes to make
    it misbehave.

    edit_image (camera name, message) and edit_pose (message) change a message before it is published. The arm
    follows the targets while they move, unless `follows` is False. While the node holds, the arm stays at
    `position`, which a test may set as if the arm were moved by hand.

    namespace: prefix of all topics; "" or a name that ends in a slash. compressed: the cameras publish JPEG.
    hears_commands: the rig subscribes to the commands, as a running controller of the arm does.
    """

    def __init__(
        self, client: Client, namespace: str = "", compressed: bool = False, hears_commands: bool = True
    ):
        self._client, self._namespace, self._compressed = client, namespace, compressed
        node = client.node
        self.cameras_on = True
        self.gripper_lag_s = 0.0
        self.pose_on = True
        self.poses_sent = 0
        self.position = np.array([0.4, 0.0, 0.3])
        self.edit_image = lambda name, image: None
        self.edit_pose = lambda pose: None
        self.follows = True
        # The images are small: if a node ends before it has taken an image, that image stays in this
        # process's 512 KiB of shared memory, and an image that does not fit there is lost.
        self.sizes = {"static": 64, "gripper": 48}
        self._images: dict = {}
        self._images_lock = threading.Lock()
        self.make_cameras(reliable=False)
        self._pose = node.create_publisher(PoseStamped, f"{namespace}ee_pose", 10)
        self._instruction = node.create_publisher(String, f"{namespace}instruction", LATCHED)
        self.targets: list[PoseStamped] = []
        self.twists: list[TwistStamped] = []
        self._hearing: list = []
        if hears_commands:
            self.hear_commands()
        self.grippers = client.listen(Float64MultiArray, f"{namespace}gripper_command")
        self.steps = client.listen(PolicyStep, f"{namespace}deer_vla/step")
        self.budgets = client.listen(BudgetStatus, f"{namespace}deer_vla/budget", LATCHED)
        self._random = np.random.default_rng(0)
        self._stop = threading.Event()

    def hear_commands(self) -> None:
        """Subscribes to the arm's commands."""
        for kind, topic, heard in (
            (PoseStamped, "target_pose", self.targets),
            (TwistStamped, "target_twist", self.twists),
        ):
            self._hearing.append(
                self._client.node.create_subscription(kind, f"{self._namespace}{topic}", heard.append, 100)
            )

    def stop_hearing_commands(self) -> None:
        """Ends the subscriptions to the arm's commands, as a controller does that ends."""
        while self._hearing:
            self._client.node.destroy_subscription(self._hearing.pop())

    def make_cameras(self, reliable: bool) -> None:
        """Makes camera publishers of this reliability, and destroys earlier ones."""
        kind, suffix = (CompressedImage, "/compressed") if self._compressed else (Image, "")
        # The queues have depth 1, and unused publishers are destroyed, for the same reason.
        reliability = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
        quality = QoSProfile(depth=1, reliability=reliability)
        with self._images_lock:
            self._destroy_cameras()
            self._images = {
                name: self._client.node.create_publisher(
                    kind, f"{self._namespace}camera/{name}/image_raw{suffix}", quality
                )
                for name in self.sizes
            }

    def _destroy_cameras(self) -> None:
        for publisher in self._images.values():
            self._client.node.destroy_publisher(publisher)

    @contextlib.contextmanager
    def running(self) -> Iterator[Rig]:
        """A context in which a thread publishes."""
        thread = threading.Thread(target=self._run, name="rig")
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
            self._destroy_cameras()

    def instruct(self, text: str) -> None:
        """Gives an instruction after the node has received the arm's pose.

        A new rig's arm is not where the last one's was. The node does not move it on an instruction that came
        before its pose.
        """
        if self.pose_on:
            wait_until(lambda: self.poses_sent >= 3, what="poses of a rig that is running")
        self._instruction.publish(String(data=text))

    def await_steps(self, count: int = 1, timeout: float = 20.0) -> list[PolicyStep]:
        """Waits for the next `count` steps and returns them."""
        begin = len(self.steps)
        wait_until(lambda: len(self.steps) >= begin + count, timeout, f"{count} steps")
        return self.steps[begin : begin + count]

    def await_hold(self, timeout: float = 10.0) -> PoseStamped | None:
        """Waits until the node holds: three zero twists in a row.

        Returns the newest target, None if there was none.
        """
        begin = len(self.twists)
        wait_until(
            lambda: len(self.twists) >= begin + 3 and not any(map(moves, self.twists[-3:])), timeout, "a hold"
        )
        return self.targets[-1] if self.targets else None

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            now = self.now()
            if self.follows and self.targets and self.twists and moves(self.twists[-1]):
                target = self.targets[-1].pose.position
                self.position = np.array([target.x, target.y, target.z])
            if self.pose_on:
                pose = PoseStamped()
                pose.header.stamp, pose.header.frame_id = now.to_msg(), "base"
                pose.pose.position.x, pose.pose.position.y, pose.pose.position.z = map(float, self.position)
                pose.pose.orientation.x, pose.pose.orientation.w = 1.0, 0.0
                self.edit_pose(pose)
                self._pose.publish(pose)
                self.poses_sent += 1
            if self.cameras_on:
                with self._images_lock:
                    self._publish_image("static", now)
                    self._publish_image("gripper", now - Duration(seconds=self.gripper_lag_s))

    def now(self) -> Time:
        """The time with which inputs are stamped."""
        return self._client.node.get_clock().now()

    def _publish_image(self, name: str, time: Time) -> None:
        size = self.sizes[name]
        pixels = self._random.integers(0, 255, (size, size, 3), dtype=np.uint8)
        if self._compressed:
            buffer = io.BytesIO()
            Picture.fromarray(pixels).save(buffer, "jpeg")
            image = CompressedImage(format="jpeg", data=buffer.getvalue())
        else:
            image = Image(height=size, width=size, encoding="rgb8", step=3 * size, data=pixels.tobytes())
        image.header.stamp = time.to_msg()
        self.edit_image(name, image)
        self._images[name].publish(image)


def moves(twist: TwistStamped) -> bool:
    """Whether a twist is not zero."""
    linear, angular = twist.twist.linear, twist.twist.angular
    return any((linear.x, linear.y, linear.z, angular.x, angular.y, angular.z))
