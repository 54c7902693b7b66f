"""The ClientApp. For FedFTG it sends its class counts (required) and its partition id (for reproducible runs)."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_app.task import NUM_CLASSES, Net, client_data, train
from fedftg.flower import class_counts

app = ClientApp()


@app.train()
def train_client(message: Message, context: Context) -> Message:
    settings = context.run_config
    client = int(context.node_config["partition-id"])
    torch.manual_seed(1000 * int(settings["seed"]) + client)
    images, labels = client_data(
        client, int(settings["num-clients"]), float(settings["alpha"]), seed=int(settings["seed"])
    )
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train(model, images, labels, int(settings["local-epochs"]), float(settings["lr"]))
    metrics = {
        "num-examples": len(labels),
        "train_loss": loss,
        "class-counts": class_counts(labels, NUM_CLASSES),
        "partition-id": client,
    }
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)
