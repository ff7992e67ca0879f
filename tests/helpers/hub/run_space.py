"""Runs the `app.py` of a Space where `hf_moe` cannot be imported: `run_space FOLDER`."""

import os
import runpy
import sys

from helpers.hub.open_checkpoint import NoHfMoe


sys.meta_path.insert(0, NoHfMoe())
os.chdir(sys.argv[1])
# As `python app.py` would have it.
sys.path[0] = os.getcwd()
runpy.run_path("app.py", run_name="__main__")
