"""The one error that the node's layers raise towards the HTTP routes."""


class NodeError(Exception):
    """A failure with the HTTP status and the text that Ollama would answer.

    ``kind`` is the error type in the shape of the API called, empty where its status alone decides.
    """

    def __init__(self, status: int, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind


def model_not_found(name: str) -> NodeError:
    return NodeError(404, f"model '{name}' not found")
