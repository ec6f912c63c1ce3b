"""The numbers of metrics.jsonl as event files for TensorBoard, where its package is installed."""

from pathlib import Path


def event_writer_class():
    """torch.utils.tensorboard.SummaryWriter. Raises ValueError where the package that it needs is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    return SummaryWriter


class EventFiles:
    """For one process to write."""

    def __init__(self, directory: Path, steps_done: int):
        """TensorBoard drops the points after the first steps_done steps, which an interrupted run left behind: they
        are measured again, as step 0 is where none is done."""
        self.directory = directory
        self.writer = event_writer_class()(directory, purge_step=steps_done + 1 if steps_done else 0)

    def write(self, metrics: dict) -> None:
        """Add each number of a line of metrics.jsonl by its name, at its step. Where that cannot be written (a full
        disk), say so and write no more."""
        if self.writer is None:
            return
        try:
            for name, value in metrics.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, value, metrics["step"])
            self.writer.flush()
        except OSError as error:
            self.writer = None
            print(f"{self.directory} cannot be written ({error}): going on without it")
