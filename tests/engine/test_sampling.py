import numpy as np

from fedftg.engine.sampling import CohortConfig, cohort

ALL = list(range(100))


def test_fixed_size_without_replacement_and_sorted() -> None:
    config = CohortConfig(size=10)
    chosen = cohort(config, ALL, seed=0, round=1)
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen) == cohort(config, ALL, 0, 1)
    assert chosen not in (cohort(config, ALL, 0, 2), cohort(config, ALL, 1, 1))


def test_bernoulli_mean_and_spread() -> None:
    """1,000 draws of Binomial(100, 0.1): mean 10, standard deviation 3; five standard errors of the mean are 0.47."""
    sizes = [len(cohort(CohortConfig(probability=0.1), ALL, 0, round)) for round in range(1, 1001)]
    assert abs(np.mean(sizes) - 10) < 0.47
    assert 2.5 < np.std(sizes) < 3.5
    assert all(cohort(CohortConfig(probability=0.01), [3, 7], 0, round) for round in range(1, 300)), "never empty"


def test_only_candidates_and_at_most_all_of_them() -> None:
    assert cohort(CohortConfig(), [1, 4], 0, 1) == cohort(CohortConfig(probability=1.0), [1, 4], 0, 1) == [1, 4]
    assert cohort(CohortConfig(size=2), [5, 9], 0, 1) == [5, 9]
