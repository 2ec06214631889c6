# All environment variables that the processes of this project need: `. scripts/env.sh` (bash or zsh).
# The make targets source it too, so that `make` and a shell that sourced it have the same environment.
# Source this file, do not execute it: it only exports. `make build` creates the folders that it names.

_deer_root=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)
_deer_site=$(cd "$_deer_root" && echo build/messages/prefix/lib/python3.*/site-packages)

export VIRTUAL_ENV="$_deer_root/.venv"
export PATH="$VIRTUAL_ENV/bin:$PATH"

# The sources come first: deer_vla_ros/__init__.py then finds the generated deer_vla_ros.msg on the same path.
export PYTHONPATH="$_deer_root:$_deer_root/$_deer_site${PYTHONPATH:+:$PYTHONPATH}"
_deer_prefixes="$_deer_root/build/messages/prefix:$VIRTUAL_ENV"
export AMENT_PREFIX_PATH="$_deer_prefixes${AMENT_PREFIX_PATH:+:$AMENT_PREFIX_PATH}"

# The ROS wheels start Python a second time to set LD_LIBRARY_PATH. This file sets it instead, and tells the
# wheels so. Child processes inherit both variables.
_deer_libs="$_deer_root/build/messages/prefix/lib:$VIRTUAL_ENV/lib"
for _deer_dir in "$VIRTUAL_ENV"/lib/python3.*/site-packages/ros_*.libs; do
    _deer_libs="$_deer_libs:$_deer_dir"
done
export LD_LIBRARY_PATH="$_deer_libs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export _ROS_WHEELS_BOOTSTRAP_COMPLETE=1

# ROS messages do not leave this machine unless the user has set this variable. ROS_DOMAIN_ID is not set here,
# so that the nodes of two shells find each other.
export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"

# MuJoCo renders in software, without a display. It uses one llvmpipe thread; the policy has the other cores.
export MUJOCO_GL="${MUJOCO_GL:-egl}"
export LP_NUM_THREADS="${LP_NUM_THREADS:-1}"

# The matrices of numpy and scipy are small here. Their thread pools would only take time from torch, which
# uses
# all cores.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"

# Only the number of jobs is limited. With a load limit, which is colcon's default, a build on a busy machine
# waits for minutes.
export MAKEFLAGS="-j$(nproc)"

unset _deer_root _deer_site _deer_prefixes _deer_libs _deer_dir
