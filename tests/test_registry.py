"""One row is all that a method of another package needs: it is built with, saved, loaded and generated with."""

import pytest
import torch
from reference import load
from tiny import random_prompts, write_tiny_checkpoints
from tokenizer import tiny_tokenizer, topic_texts

from mediator_peft import MediatorConfig, build_mediator, load_mediator, register_method
from mediator_peft.errors import AdapterError, ConfigError
from mediator_peft.methods.conflict import ConflictScore
from mediator_peft.methods.encoding import Encoding
from mediator_peft.methods.merging import MergeMethod
from mediator_peft.methods.sparsifying import Sparsifier
from mediator_peft.registry import METHOD_TABLES
from mediator_peft.routing.routers import Router

TOY_NAMES = {field: f"toy_{field}" for field in METHOD_TABLES}


class HalvesEncoding(Encoding):
    """Kept entries as float16, two parts: even places and odd places."""

    part_names = ("even", "odd")

    def encode(self, delta, kept, precision):
        values = delta[kept].half()
        return {"even": values[::2], "odd": values[1::2]}

    def decode(self, parts, kept):
        values = torch.empty(int(kept.sum()))
        values[::2], values[1::2] = parts["even"].float(), parts["odd"].float()
        return values

    def value_bytes(self, num_kept, num_rows, number_size):
        return 2 * num_kept

    def part_sizes(self, num_kept):
        return {"even": (num_kept + 1) // 2, "odd": num_kept // 2}


class CentroidRouter(Router):
    """Nearest class mean by Euclidean distance."""

    def fit(self, features, labels, background=None, hard_negatives=None):
        self._set("centres", torch.stack([features[labels == k].mean(dim=0) for k in range(self.num_experts)]))

    def scores(self, features):
        return -torch.cdist(features.float(), self.centres)

    def distance(self, features):
        return -self.scores(features).amax(dim=1)

    def background_log_odds(self, features):
        return self.distance(features)

    def shapes(self):
        return {"centres": (self.num_experts, self.num_features)}


def every_second_column(delta, density, generator=None):
    sparse = delta.clone()
    sparse[:, 1::2] = 0
    return sparse


TOYS = {
    "merge_method": MergeMethod(lambda task_vectors: 0.25 * task_vectors.sum(dim=0), is_entrywise=True),
    "sparsifier": Sparsifier(every_second_column),
    "conflict_score": ConflictScore(lambda statistics: statistics.energies, lambda counts: float(counts.sum() > 0)),
    "encoding": HalvesEncoding(),
    "router": CentroidRouter,
}


@pytest.fixture
def toys(monkeypatch):
    """The toy methods, entered for one test."""
    for field, (table, _) in METHOD_TABLES.items():
        monkeypatch.setitem(table, TOY_NAMES[field], None)
        del table[TOY_NAMES[field]]
        register_method(field, TOY_NAMES[field], TOYS[field])


@torch.no_grad()
def test_methods_from_outside_go_the_whole_way(tmp_path, toys):
    paths = write_tiny_checkpoints(tmp_path / "checkpoints")
    experts = {name: path for name, path in paths.items() if name != "base"}
    config = MediatorConfig(**TOY_NAMES, density=0.5)
    build_mediator(paths["base"], experts, tmp_path / "out", config, workers=2)
    model, _ = load_mediator(tmp_path / "out", dtype=torch.float32)

    states = {name: load(path).state_dict() for name, path in paths.items()}
    key = "model.layers.1.mlp.up_proj"
    base, math, code = (states[name][f"{key}.weight"] for name in ("base", "math", "code"))
    dense = base + 0.25 * (math - base + code - base)
    torch.testing.assert_close(model.get_base_model().get_submodule(key).base_layer.weight, dense)
    delta = model.base_model.routed_layers()[key].mediator_bank["default"].get("code").dense()
    expected = code - dense
    expected[:, 1::2] = 0
    torch.testing.assert_close(delta, expected.half().float(), rtol=2e-3, atol=1e-6)

    tokenizer = tiny_tokenizer()
    topics = {"math": topic_texts(5, 45, 40, seed=1), "code": topic_texts(50, 90, 40, seed=2)}
    model.fit_router(topics, tokenizer)
    assert isinstance(model.base_model.router, CentroidRouter)
    model.save_pretrained(tmp_path / "saved")
    again, _ = load_mediator(tmp_path / "saved", dtype=torch.float32)
    prompts = tokenizer(topics["code"][:4], return_tensors="pt", padding=True, return_token_type_ids=False)
    route, same = model.route(**prompts), again.route(**prompts)
    assert route.scores.argmax(dim=1).tolist() == [1] * 4
    torch.testing.assert_close(route.expert_weights, same.expert_weights)
    for each in (model, again):
        with each.use_experts("code"):
            logits = each(input_ids=random_prompts(2)).logits
        with each.disable_adapter():
            assert (logits - each(input_ids=random_prompts(2)).logits).abs().max() > 1e-2
    new = [each.generate(**prompts, max_new_tokens=5, do_sample=False) for each in (model, again)]
    torch.testing.assert_close(new[0], new[1])


def test_names_and_types_are_checked(toys):
    with pytest.raises(ConfigError, match="is taken"):
        register_method("encoding", "sign", HalvesEncoding())
    with pytest.raises(ConfigError, match="must be a MergeMethod"):
        register_method("merge_method", "plain_function", lambda task_vectors: task_vectors[0])
    with pytest.raises(ConfigError, match="subclass of Router"):
        register_method("router", "no_router", HalvesEncoding)
    with pytest.raises(ConfigError, match="letters"):
        register_method("encoding", "a.b", HalvesEncoding())
    with pytest.raises(ConfigError, match="merge_method"):
        register_method("merge_methods", "x", TOYS["merge_method"])
    register_method("encoding", TOY_NAMES["encoding"], TOYS["encoding"])  # the same once more is no fault


def test_an_adapter_whose_method_is_not_registered_says_so(tmp_path, toys, monkeypatch):
    paths = write_tiny_checkpoints(tmp_path / "checkpoints")
    experts = {name: path for name, path in paths.items() if name != "base"}
    build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(encoding="toy_encoding"))
    monkeypatch.delitem(METHOD_TABLES["encoding"][0], "toy_encoding")
    with pytest.raises(AdapterError, match="toy_encoding"):
        load_mediator(tmp_path / "out")
