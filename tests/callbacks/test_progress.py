from randlora_pl.callbacks import ProgressBar
from tests.callbacks.conftest import Fit


def test_bar_of_the_whole_training_says_so(fit: Fit) -> None:
    bar = ProgressBar()
    trainer, task, _ = fit(bar, enable_progress_bar=True)
    assert bar._get_train_description(0) == "Training"
    assert "v_num" not in bar.get_metrics(trainer, task)
    assert bar.refresh_rate >= 10, "a stage ends after a refresh"
    assert "train/acc" in bar.get_metrics(trainer, task)
