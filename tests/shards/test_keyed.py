import numpy as np

from shards import keyed


def test_values_are_fixed_forever():
    # A change of these numbers changes the order and the augmentation of every run ever made.
    assert keyed.hash_u64(1, "golden", np.arange(3)).tolist() == [
        9404170074745984612,
        1476902604011235901,
        16159526464463900224,
    ]
    assert keyed.permutation(8, 1, "golden", 2).tolist() == [0, 1, 6, 4, 5, 7, 3, 2]


def test_vectorised_equals_one_by_one():
    ids, epochs = np.arange(50), np.arange(50) % 3
    together = keyed.uniform(3, "crop", epochs, ids, draws=4)
    for i in range(50):
        assert (keyed.uniform(3, "crop", int(epochs[i]), int(ids[i]), draws=4) == together[i]).all()
    assert (
        keyed.uniform(3, "crop", epochs, ids, draws=2) == together[:, :2]
    ).all()  # more draws never move earlier ones


def test_streams_are_independent_and_uniform():
    u = keyed.uniform(1, "a", np.arange(20_000), draws=2)
    v = keyed.uniform(1, "b", np.arange(20_000), draws=1)[:, 0]
    assert abs(u.mean() - 0.5) < 0.01 and 0.0 <= u.min() and u.max() < 1.0
    for other in (u[:, 1], v, np.roll(u[:, 0], 1)):
        assert abs(np.corrcoef(u[:, 0], other)[0, 1]) < 0.03
    counts = np.bincount((u[:, 0] * 16).astype(int), minlength=16)
    assert ((counts - 1250) ** 2 / 1250).sum() < 45  # chi-square with 15 degrees of freedom, p about 1e-4
    n = keyed.normal(1, "n", np.arange(20_000), draws=1)
    assert abs(n.mean()) < 0.03 and abs(n.std() - 1) < 0.03


def test_permutation_and_integers():
    order = keyed.permutation(1000, 5, "chunks", 0)
    assert (
        sorted(order.tolist()) == list(range(1000))
        and order.tolist() != keyed.permutation(1000, 5, "chunks", 1).tolist()
    )
    drawn = keyed.integers(2, 5, 0, "view", np.arange(3000))[:, 0]
    assert set(drawn.tolist()) == {2, 3, 4}


def test_text_keys():
    assert keyed.text_key("No  acute\nfinding.") == keyed.text_key("no acute finding.") >= 0
    assert keyed.text_key("a") != keyed.text_key("b")
