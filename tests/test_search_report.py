"""What a search's report draws."""

import optuna

from trainer import search_report


def test_shares_of_the_variance_are_those_of_the_options() -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=5))
    study.optimize(lambda trial: 2 * trial.suggest_float("much", 0, 1) + trial.suggest_float("less", 0, 1)
                   + 0 * trial.suggest_float("nothing", 0, 1), n_trials=20)  # fmt: skip
    (axes,) = search_report.importances(study).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    shares = dict(zip(names, [bar.get_width() for bar in axes.patches], strict=True))
    assert shares["much"] > 60
    assert 5 < shares["less"] < 35
    assert shares["nothing"] < 5


def test_picture_of_a_search_ends_at_100_percent() -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trials([optuna.trial.create_trial(value=value) for value in (0.9, 0.999)])
    (axes,) = search_report.history(study.trials).axes
    assert axes.get_ylim()[1] == 100
