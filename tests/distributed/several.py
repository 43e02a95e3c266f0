"""Train several runs one after the other in the same processes: `torchrun ... several.py RUNS`, lists of overrides.

Most of what a short run costs is the start of its processes. RUNS is JSON.
"""

import json
import sys

import train
from configs.app import configured
from training.config import Config

if __name__ == "__main__":
    for overrides in json.loads(sys.argv[1]):
        if code := train.main(configured(Config, overrides)):
            sys.exit(code)
