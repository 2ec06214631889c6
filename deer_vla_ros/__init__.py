"""deer_vla_ros: a multi-exit vision-language-action policy for ROS 2.

Importing the package is cheap: no torch, no rclpy. Its path is extended over all of sys.path because in a
source checkout the generated `deer_vla_ros.msg` lies in a build folder, beside these sources only once both
are installed.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
__version__ = "0.1.0"
