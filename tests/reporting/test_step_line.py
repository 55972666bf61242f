"""The lines of a training on the terminal."""

from grape_jax.reporting.step_line import sample_line, step_line


def test_a_step_says_how_good_the_best_could_be():
    metrics = {"reward": 0.7712, "median_rank": 7.0, "recall_at_1": 0.234, "seconds": 8.06}
    line = step_line(7, 102, metrics, 1.1, 1640, "09:12 left")
    first, *others = line.removeprefix("step ").strip().split("  ")
    assert first == "7/102" and others == [
        "reward 0.77 of 1.1", "median rank 7 of 1,640", "found first 23 %", "8.1 s", "09:12 left",
    ]  # fmt: skip
    metrics |= {"median_rank": 1234.5, "validation_recall_at_10": 0.5}
    line = step_line(100, 102, metrics, 1.1, 1640, "")
    assert "median rank 1,234.5 of 1,640" in line and "first ten 50 %" in line
    assert line.endswith("8.1 s")


def test_a_supervised_step_has_a_loss_alone():
    line = step_line(1, 4, {"loss": 2.5, "seconds": 3.0}, 1.1, 1640, "")
    assert line == "step 1/4  supervised  loss 2.500  3.0 s"


def test_the_sample_query_names_its_picture():
    line = sample_line("make it green", "red apple", "green apple", 1200, 1640)
    assert line.strip() == "'red apple' + 'make it green' -> 'green apple': rank 1,200 of 1,640"
    assert sample_line("aple", "", "apple", 1, 9).strip() == "'aple' -> 'apple': rank 1 of 9"
