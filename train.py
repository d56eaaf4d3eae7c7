"""Trains a language model: `python train.py --config configs/quickstart.yaml`."""

from tttlm.cli.train import run

if __name__ == "__main__":
    run()
