"""Scores a trained run: `python eval.py runs/quickstart --text book.txt`."""

from tttlm.cli.eval import run

if __name__ == "__main__":
    run()
