"""What would it have done on this recording? rosbag2 in, decisions out; no network in here.

For tests of your own: `from deer_vla_ros.bag.golden import assert_replays, decisions`.
"""
