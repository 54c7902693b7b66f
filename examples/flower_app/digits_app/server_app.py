"""The ServerApp: a strategy of Flower's, and FedFTG around it."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Krum

from digits_app.task import IMAGE_SHAPE, Net, accuracy, test_data
from fedftg.flower import FedFTG

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    clients = int(settings["num-clients"])
    asked = {"min_train_nodes": clients, "min_available_nodes": clients, "fraction_evaluate": 0.0}
    torch.manual_seed(int(settings["seed"]))
    model = Net()

    if settings["strategy"] == "fedadam":
        strategy = FedAdam(eta=0.03, tau=0.01, **asked)
    elif settings["strategy"] == "krum":
        strategy = Krum(num_malicious_nodes=2, **asked)
    else:
        strategy = FedAvg(**asked)
    if settings["refine"]:
        folder = str(settings["checkpoint"]) or None
        strategy = FedFTG(strategy, model=model, image_shape=IMAGE_SHAPE, checkpoint=folder)  # the one line

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord({"accuracy": accuracy(model, *test_data())})

    result = strategy.start(
        grid, ArrayRecord(model.state_dict()), int(settings["num-server-rounds"]), evaluate_fn=evaluate
    )
    for number, metrics in result.evaluate_metrics_serverapp.items():
        print(f"round {number}: accuracy {metrics['accuracy']:.3f}", flush=True)
