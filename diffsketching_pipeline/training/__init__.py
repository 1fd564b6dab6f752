# SPDX-License-Identifier: Apache-2.0
"""The training of every model of this project; scripts in `training/` are made of it. Needs the extra `train`."""
