"""train.py whose checkpoints take their time to be written, so that a kill can meet them half-written."""

import time

import train
from configs.app import app
from training import checkpoint


def lingering(function):
    def linger(*args):
        time.sleep(0.1)
        return function(*args)

    return linger


checkpoint.save_file, checkpoint.sha256_of = lingering(checkpoint.save_file), lingering(checkpoint.sha256_of)

if __name__ == "__main__":
    app(train.main)
