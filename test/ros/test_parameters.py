"""The YAML that people edit says what the node declares."""

from pathlib import Path

import yaml

from deer_vla_ros.ros.parameters import DECLARATIONS, NODE_NAME

CONFIG = Path(__file__).parents[2] / "config" / "deer_vla.yaml"


def test_the_config_file_holds_every_parameter_at_its_default():
    given = yaml.safe_load(CONFIG.read_text())["/**"][NODE_NAME]["ros__parameters"]
    assert given == {declaration.name: declaration.default for declaration in DECLARATIONS}


def test_every_number_has_a_range_and_every_parameter_a_sentence():
    for declaration in DECLARATIONS:
        assert declaration.description.endswith(".")
        if isinstance(declaration.default, (int, float)) and not isinstance(declaration.default, bool):
            assert declaration.low <= declaration.default <= declaration.high
