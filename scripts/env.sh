# Everything a process of this project needs in its environment, in one place: `. scripts/env.sh` (bash or zsh).
# The make targets source it too, so a shell that sourced it and `make` run the same thing.
# Sourced, never executed: it only exports. `make build` creates what it points at.

_deer_root=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)
_deer_site=$(cd "$_deer_root" && echo build/messages/prefix/lib/python3.*/site-packages)

export VIRTUAL_ENV="$_deer_root/.venv"
export PATH="$VIRTUAL_ENV/bin:$PATH"

# Live sources first: deer_vla_ros/__init__.py then finds the generated deer_vla_ros.msg on the same path.
export PYTHONPATH="$_deer_root:$_deer_root/$_deer_site${PYTHONPATH:+:$PYTHONPATH}"
export AMENT_PREFIX_PATH="$_deer_root/build/messages/prefix:$VIRTUAL_ENV${AMENT_PREFIX_PATH:+:$AMENT_PREFIX_PATH}"

# The ROS wheels re-execute Python once to set LD_LIBRARY_PATH. Doing it here saves that second start, and as both
# variables are inherited together, a child process never has one without the other.
_deer_libs="$_deer_root/build/messages/prefix/lib:$VIRTUAL_ENV/lib"
for _deer_dir in "$VIRTUAL_ENV"/lib/python3.*/site-packages/ros_*.libs; do
    _deer_libs="$_deer_libs:$_deer_dir"
done
export LD_LIBRARY_PATH="$_deer_libs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export _ROS_WHEELS_BOOTSTRAP_COMPLETE=1

# Nothing leaves this machine unless the user asked for it. ROS_DOMAIN_ID is left alone: two shells have to meet.
export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"

# MuJoCo renders headless in software; one llvmpipe thread leaves the other cores to the policy.
export MUJOCO_GL="${MUJOCO_GL:-egl}"
export LP_NUM_THREADS="${LP_NUM_THREADS:-1}"

# numpy's and scipy's matrices are small here: their thread pools would only spin beside torch's, which keeps all cores.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"

# A load limit, colcon's default, waits for minutes on a busy machine: jobs only.
export MAKEFLAGS="-j$(nproc)"

unset _deer_root _deer_site _deer_libs _deer_dir
