"""RecTools' SASRec in a process and an environment of its own: it trains at every line of input.

Run by test_rectools.py with the interpreter that PINET_FAST_RECTOOLS names; it imports nothing of
this project. It answers with JSON: first what it read, then the seconds of every training.
"""

import json
import sys
import time
import warnings


def main() -> None:
    """Serve until the input ends."""
    warnings.filterwarnings("ignore")
    log, options = sys.argv[1], json.loads(sys.argv[2])
    import pandas as pd
    import torch
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    torch.set_num_threads(options["threads"])
    frame = pd.read_csv(log).rename(
        columns={"user": Columns.User, "item": Columns.Item, "timestamp": Columns.Datetime}
    )
    frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="s")
    frame[Columns.Weight] = 1
    dataset = Dataset.construct(frame)
    model = SASRecModel(
        n_factors=options["dim"], n_blocks=2, n_heads=1, session_max_len=options["max_len"],
        batch_size=options["batch_size"], loss="BCE", n_negatives=1, dropout_rate=0.2,
        epochs=1, verbose=0, dataloader_num_workers=0,
    )  # fmt: skip
    facts = {"users": int(frame[Columns.User].nunique()), "events": len(frame)}
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        model.fit_partial(dataset, min_epochs=options["epochs"], max_epochs=options["epochs"])
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
