"""Settings are checked when made, all at once."""

import json
import warnings

import pytest
from peft import PeftConfig
from peft.utils import PeftType

from mediator_peft import MediatorConfig
from mediator_peft.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(density=0), "density must be in"),
        (dict(density=1.5), "density must be in"),
        (dict(density=float("nan")), "density must be in"),
        (dict(density=True), "density must be in"),
        (dict(conflict_density=-1), "conflict_density"),
        (dict(conflict_threshold=float("nan")), "conflict_threshold"),
        (dict(routing_top_p=0), "routing_top_p"),
        (dict(ood_alpha=1), "ood_alpha"),
        (dict(merge_method="averge"), "Did you mean 'average'"),
        (dict(conflict_score="sing"), "Did you mean 'sign'"),
        (dict(sparsifier="magnitud"), "Did you mean 'magnitude'"),
        (dict(encoding="floats"), "Did you mean 'float'"),
        (dict(router="gausian"), "Did you mean 'gaussian'"),
        (dict(density_scope="modle"), "Did you mean 'model'"),
        (dict(budget="much"), "budget must be like"),
        (dict(budget=0), "budget must be like"),
        (dict(budget=1.5), "budget must be like"),
        (dict(sparsifier="svd", rank=0), "rank must be"),
        (dict(rank=4), "rank is for"),
        (dict(sparsifier="svd", rank=4, budget="2x"), "rank fixes"),
        (dict(sparsifier="svd", encoding="float"), "does not go with"),
        (dict(encoding="factors"), "does not go with"),
        (dict(sparsifier="svd", for_quantization="nf4"), "no low rank"),
        (dict(fallback="bsae"), "Did you mean 'base'"),
        (dict(router_layer=-1), "router_layer"),
        (dict(router_layer=True), "router_layer"),
        (dict(routed_layers="al"), "Did you mean 'all'"),
        (dict(routed_layers=0.0), "routed_layers"),
        (dict(routed_layers=[]), "routed_layers"),
        (dict(routed_layers=[1, 1]), "routed_layers"),
        (dict(experts={"a.b": "x"}), "no dots or slashes"),
        (dict(experts={"a/b": "x"}), "no dots or slashes"),
        (dict(experts={"..": "x"}), "no dots or slashes"),
        (dict(experts={"base": "x"}), "taken by the fallback"),
        (dict(experts={"": "x"}), "cannot be used"),
        (dict(denssity=0.1), "Did you mean 'density'"),
    ],
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MediatorConfig(**settings)


def test_all_faults_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        MediatorConfig(density=2, encoding="flot", experts={"a.b": "x"})
    assert all(part in str(caught.value) for part in ("density", "flot", "a.b"))


def test_saving_and_reading_is_a_round_trip(tmp_path):
    config = MediatorConfig(experts={"math": "a", "code": "b"}, density=0.3, routed_layers=[1, 2], router_layer=0)
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, MediatorConfig)
    assert again.to_dict() == config.to_dict()


def test_peft_knows_the_method():
    """PEFT's enumeration has a member of ours; this fails loudly when PEFT changes how that works."""
    assert PeftType("MEDIATOR") is PeftType.MEDIATOR
    assert MediatorConfig().peft_type is PeftType.MEDIATOR
    assert PeftType.MEDIATOR.value == "MEDIATOR"
    assert list(PeftType).count(PeftType.MEDIATOR) == 1


def test_columns_end_with_the_fallback():
    assert MediatorConfig(experts={"b": "x", "a": "y"}).columns == ["b", "a", "base"]
    assert MediatorConfig(experts={"b": "x", "a": "y"}, fallback="backbone").columns == ["b", "a"]


@pytest.mark.parametrize(
    ("old", "value", "new", "kept"),
    [
        ("values", "float", "encoding", "float"),
        ("sign_scale", "norm", "rescale", "norm"),
        ("top_p", 0.75, "routing_top_p", 0.75),
        ("route_on", "first", "routing_turn", "first"),
        ("sparsifier", "random", "sparsifier", "dare"),
    ],
)
def test_former_names_warn_and_work(old, value, new, kept):
    with pytest.warns(DeprecationWarning, match=new if old != new else kept):
        config = MediatorConfig(**{old: value, **({"encoding": "float"} if value == "random" else {})})
    assert getattr(config, new) == kept
    if old != new:
        with pytest.warns(DeprecationWarning, match=new):
            assert getattr(config, old) == kept
        with pytest.warns(DeprecationWarning, match=new):
            setattr(config, old, value)
        with pytest.raises(ConfigError, match="one of them"):
            MediatorConfig(**{old: value, new: kept})


def test_files_of_former_versions_load_without_a_warning(tmp_path):
    config = MediatorConfig(encoding="float", rescale="norm", routing_top_p=0.75, routing_turn="first")
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    former = {"encoding": "values", "rescale": "sign_scale", "routing_top_p": "top_p", "routing_turn": "route_on"}
    path.write_text(json.dumps({former.get(key, key): value for key, value in saved.items()}), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == config
