"""Processes of a job as threads, and data for them."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread

from PIL import Image
from torch.distributed import HashStore

from randlora_pl.run.parallel.launch import Meeting
from randlora_pl.utils.errors import LostProcessError, UserError


def meetings(world: int = 3, timeout: float = 5) -> list[Meeting]:
    store = HashStore()
    return [Meeting(store, rank, world, timeout) for rank in range(world)]


def messages(calls: list[Callable[[], None]]) -> list[str]:
    """Call all at once, each as a process; return their errors."""
    found = [""] * len(calls)

    def one(rank: int) -> None:
        try:
            calls[rank]()
        except (UserError, LostProcessError) as error:
            found[rank] = str(error)

    threads = [Thread(target=one, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def write_folder(folder: Path) -> None:
    """Twelve pictures of two classes."""
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 40), (9 * number, 0, 0)).save(folder / split / name / f"{split}{number}.png")
