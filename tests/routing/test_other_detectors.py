"""Distance, closeness and decision rule beside the detectors of the package pytorch-ood, on the same features.

The package needs torchvision for its image models alone, and torchvision's wheels do not fit every build of torch. So
it is in no extra: ``pip install --no-deps pytorch-ood`` is enough for these tests.
"""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mediator_peft.routing.calibration import calibrate
from mediator_peft.routing.decision_rule import Negatives
from mediator_peft.routing.metrics import auroc
from mediator_peft.routing.neighbours import fit_neighbours
from mediator_peft.routing.routers import ROUTERS
from mediator_peft.routing.wording import wording_basis


class _StandIn(ModuleType):
    """A module whose every name is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandInsForTorchvision:
    """Finds ``torchvision`` and its modules as stand-ins."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.util.spec_from_loader(name, _StandInsForTorchvision, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return _StandIn(spec.name)

    @staticmethod
    def exec_module(module):
        pass


@pytest.fixture(scope="module")
def detector():
    """The package's module of detectors; what stands in for torchvision is gone after the import."""
    if importlib.util.find_spec("pytorch_ood") is None:
        pytest.skip("pytorch-ood is not installed")
    before = set(sys.modules)
    sys.meta_path.insert(0, _StandInsForTorchvision)
    try:
        return pytest.importorskip("pytorch_ood.detector")
    finally:
        sys.meta_path.remove(_StandInsForTorchvision)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision" and name not in before]:
            del sys.modules[name]


def ranks(values):
    return values.double().argsort().argsort().double()


def rank_correlation(first, second):
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


def test_the_distance_orders_prompts_as_the_packages_mahalanobis(detector):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) % 3
    centres = 4 * torch.randn(3, 10, generator=generator)
    features = centres[labels] + torch.randn(3000, 10, generator=generator)
    prompts = 5 * torch.randn(200, 10, generator=generator)
    router = ROUTERS["gaussian"](3, 10)
    router.fit(features, labels)
    theirs = detector.Mahalanobis(None)
    theirs.fit_features(features, labels)
    with torch.no_grad():
        assert rank_correlation(router.distance(prompts), theirs.predict_features(prompts)) > 0.995


def test_closeness_is_half_the_difference_of_the_packages_squared_neighbour_distances(detector):
    generator = torch.Generator().manual_seed(1)
    own, background = torch.randn(40, 8, generator=generator) + 2, torch.randn(50, 8, generator=generator)
    prompts = torch.randn(30, 8, generator=generator)
    stored = fit_neighbours(own, torch.zeros(40, dtype=torch.long), background, torch.eye(8))
    to_own, to_background = detector.KNN(None, k=1), detector.KNN(None, k=1)
    for knn, rows in ((to_own, own), (to_background, background)):
        knn.fit_features(stored.inside(rows), torch.zeros(len(rows), dtype=torch.long))
    inside = stored.inside(prompts)
    half = 0.5 * (to_background.predict_features(inside) ** 2 - to_own.predict_features(inside) ** 2)
    found = stored.closeness(prompts, torch.zeros(30, dtype=torch.long))
    torch.testing.assert_close(found.double(), torch.as_tensor(half).double(), atol=1e-5, rtol=1e-4)


def wordings_and_families(seed=0):
    """Three experts in one wording each, other wordings of them, and families of which the last four are not fitted on.

    Wordings move every task along the same few directions, and further than families lie apart.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    size = 24
    wording = torch.linalg.qr(normal(size, 4)).Q.T
    tasks, families = 0.8 * normal(3, size), 0.8 * normal(16, size)
    labels, other = torch.arange(150) % 3, torch.arange(16).repeat_interleave(15)
    own = tasks[labels] + 0.5 * normal(150, size)
    new = tasks[labels] + 0.5 * normal(150, size) + 6 * normal(150, 4) @ wording
    negatives = families[other] + 0.5 * normal(240, size) + 6 * normal(240, 4) @ wording
    reference_tasks = torch.arange(20).repeat_interleave(10)
    reference = 0.8 * normal(20, size)[reference_tasks] + 0.5 * normal(200, size) + 6 * normal(200, 4) @ wording
    fitted = other < 12
    known = Negatives(negatives[fitted], other[fitted], torch.ones(180) > 0, wording_basis(reference, reference_tasks))
    return own, labels, new, negatives[~fitted], known


def test_the_rule_tells_families_apart_that_the_packages_detectors_confuse_with_new_wordings(detector):
    own, labels, new, unknown, negatives = wordings_and_families()
    size = own.shape[1]
    router = ROUTERS["gaussian"](3, size)
    keys = [str(number) for number in range(len(own))]
    names = [str(number) for number in range(12)]
    calibrate(
        lambda: ROUTERS["gaussian"](3, size), router, own, labels, keys, ["a", "b", "c"], 0, 0.01,
        negatives=negatives, family_names=names,
    )  # fmt: skip
    plain = LogisticRegression(max_iter=300).fit(own.numpy(), labels.numpy())
    weight, bias = torch.tensor(plain.coef_).float(), torch.tensor(plain.intercept_).float()
    theirs = {
        "relative Mahalanobis": detector.RMD(None),
        "Mahalanobis": detector.Mahalanobis(None),
        "nearest neighbours": detector.KNN(None, k=10),
        "ViM": detector.ViM(None, d=8, w=weight, b=bias),
    }
    found = {}
    for name, one in theirs.items():
        one.fit_features(own, labels)
        found[name] = auroc(*(torch.as_tensor(one.predict_features(some)) for some in (new, unknown)))
    with torch.no_grad():
        found["energy"] = auroc(*(detector.EnergyBased.score(some @ weight.T + bias) for some in (new, unknown)))
        rule = auroc(router.ood_score(new), router.ood_score(unknown))
    assert rule > max(found.values()), found
    assert rule > 0.8
