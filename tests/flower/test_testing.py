"""The in-process grid behaves as Flower's do."""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedftg.flower.testing import LocalGrid


def counting_app() -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("by hand")
        before = int(context.state["seen"]["count"]) if "seen" in context.state else 0
        context.state["seen"] = ConfigRecord({"count": before + 1})
        answer = {"partition": context.node_config["partition-id"], "seen": before + 1, "lr": context.run_config["lr"]}
        return Message(RecordDict({"config": ConfigRecord(answer)}), reply_to=message)

    return app


def asked(grid: Grid, nodes: list[int]) -> list[Message]:
    return list(grid.send_and_receive([grid.create_message(RecordDict(), "query", node, "1") for node in nodes]))


def test_replies_are_sorted_states_persist_and_errors_are_replies() -> None:
    grid = LocalGrid.of(counting_app(), 3, {"lr": 0.5})
    asked(grid, [3])
    replies = asked(grid, [3, 1, 2])
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3]
    assert replies[0].content["config"] == {"partition": 0, "seen": 1, "lr": 0.5}
    assert replies[1].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "by hand" in str(replies[1].error.reason)
    assert replies[2].content["config"]["seen"] == 2
    grid.leave(3)  # its state is lost
    assert asked(grid, [3])[0].error.code == ErrorCode.NODE_UNAVAILABLE
    grid.join(7, {"partition-id": 2})
    assert asked(grid, [7])[0].content["config"]["seen"] == 1
