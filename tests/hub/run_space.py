"""Runs the `app.py` of a Space where `hf_moe` cannot be imported: `run_space.py FOLDER`."""

import os
import runpy
import sys
from pathlib import Path

from open_checkpoint import NoHfMoe


sys.meta_path.insert(0, NoHfMoe())
os.chdir(sys.argv[1])
# As `python app.py` would have it.
sys.path[sys.path.index(str(Path(__file__).parent))] = os.getcwd()
runpy.run_path("app.py", run_name="__main__")
