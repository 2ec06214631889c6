"""`pip install .` gives the same package, in an environment that has ROS, and names the remedy in one that has not."""

import subprocess
import sys

from builds import USE_MESSAGES, clean_environment, copy_sources, run


def test_installed_package_works_from_elsewhere(tmp_path):
    # Given: pip's default isolated build, which hides the environment's own packages from the message generators.
    sources, target = copy_sources(tmp_path), tmp_path / 'target'
    environment = clean_environment()
    # When
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--target', target, sources, cwd=tmp_path, env=environment)
    # Then: the messages are usable although none of our folders is in LD_LIBRARY_PATH.
    environment['PYTHONPATH'] = str(target)
    printed = run(sys.executable, '-c', USE_MESSAGES, cwd='/', env=environment)
    assert printed.splitlines()[-1] == str(target / 'deer_vla_ros')
    assert 'usage: python -m deer_vla_ros' in run(target / 'bin/deer-vla', '--help', cwd='/', env=environment)
    assert (target / 'share/ament_index/resource_index/packages/deer_vla_ros').is_file()
    assert (target / 'lib/deer_vla_ros/deer_vla_node').stat().st_mode & 0o111
    missing = [p for p in (sources / 'deer_vla_ros').rglob('*') if p.is_file() and '__pycache__' not in p.parts
               and not (target / p.relative_to(sources)).is_file()]
    assert not missing


def test_without_ros_the_error_names_the_remedy(tmp_path):
    # Given: an interpreter whose prefix holds no ROS.
    run(sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'empty', cwd=tmp_path, env=clean_environment())
    environment = clean_environment()
    environment.pop('AMENT_PREFIX_PATH')
    environment['PYTHONPATH'] = next(p for p in sys.path if p.endswith('site-packages') and p.startswith(sys.prefix))
    # When
    done = subprocess.run([tmp_path / 'empty/bin/python', 'setup.py', '--quiet', 'build'], cwd=copy_sources(tmp_path),
                          env=environment, text=True, capture_output=True)
    # Then
    assert done.returncode != 0
    assert 'rosidl_default_generators not found' in done.stderr
    assert 'pip install -r requirements-ros.txt' in done.stderr
