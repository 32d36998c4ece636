"""lm-evaluation-harness: against its own Hugging Face class, and routes from the context alone."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, write_tiny_checkpoints
from tokenizer import tiny_tokenizer, topic_texts
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from mediator_peft import MediatorConfig, build_mediator, load_mediator
from mediator_peft.cli.app import app
from mediator_peft.errors import RoutingError
from mediator_peft.evaluation.fit_and_save import fit_and_save
from mediator_peft.evaluation.harness import HarnessError, MediatorLM, task_manager

PAIRS = [
    ("w5 w6 w7", " w8 w9"),
    ("w5 w6 w7", " w60"),
    ("", "w20 w21"),
    ("w70 w71", " w72 w73 w74"),
    ("w9", " w10"),
]
TEXTS = ["w5 w6 w7 w8 w9 w10", "w70", " ".join(f"w{number}" for number in range(5, 60))]


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Base, two experts of two topics, and ``out`` with a fitted router and lossless deltas."""
    folder = tmp_path_factory.mktemp("harness")
    paths = write_tiny_checkpoints(folder, ["base", "low", "high"])
    tiny_tokenizer().save_pretrained(paths["base"])
    experts = {name: paths[name] for name in ("low", "high")}
    settings = MediatorConfig(density=1.0, encoding="float", target_modules=["all-linear", "embed_tokens", "lm_head"])
    build_mediator(paths["base"], experts, folder / "out", settings)
    model, tokenizer = load_mediator(folder / "out")
    prompts = {"low": topic_texts(5, 40, 30), "high": topic_texts(50, 90, 30)}
    fit_and_save(model, tokenizer, prompts, folder / "out" / "mediator")
    return folder


@pytest.fixture
def plain():
    return tiny_model(), tiny_tokenizer()


@pytest.fixture
def routed(folder):
    model, tokenizer = load_mediator(folder / "out")
    return MediatorLM(model, tokenizer=tokenizer, device="cpu", batch_size=3)


def theirs(plain, **options):
    return HFLM(pretrained=plain[0], tokenizer=plain[1], batch_size=2, device="cpu", **options)


@pytest.mark.parametrize("max_length", [None, 7])
def test_log_likelihoods_are_those_of_the_harness_own_class(plain, max_length):
    ours = MediatorLM(plain[0], tokenizer=plain[1], device="cpu", batch_size=2, max_length=max_length)
    other = theirs(plain, max_length=max_length)
    for (score, greedy), (expected, expected_greedy) in zip(
        ours.loglikelihood(requests(*PAIRS)), other.loglikelihood(requests(*PAIRS)), strict=True
    ):
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


@pytest.mark.parametrize("max_length", [None, 9])
def test_rolling_log_likelihoods_are_those_of_the_harness_own_class(plain, max_length):
    ours = MediatorLM(plain[0], tokenizer=plain[1], device="cpu", max_length=max_length)
    texts = requests(*((text,) for text in TEXTS))
    expected = theirs(plain, max_length=max_length).loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-3)


def test_answers_are_those_of_the_harness_own_class(plain):
    asked = requests(*((text, {"until": ["w3"], "max_gen_toks": 12}) for text in TEXTS))
    ours = MediatorLM(plain[0], tokenizer=plain[1], device="cpu", batch_size=2).generate_until(asked)
    assert ours == theirs(plain).generate_until(asked)
    assert len(set(ours)) > 1


def test_an_answer_ends_before_its_first_stop_text(plain):
    lm = MediatorLM(plain[0], tokenizer=plain[1], device="cpu")
    prompts = topic_texts(5, 90, 12)
    asked = requests(*((text, {"until": [], "max_gen_toks": 12}) for text in prompts))
    prompt, whole = max(zip(prompts, lm.generate_until(asked), strict=True), key=lambda pair: len(pair[1]))
    stop = whole.split()[3]
    cut = lm.generate_until(requests((prompt, {"until": [stop], "max_gen_toks": 12})))[0]
    assert cut == whole[: whole.index(stop)]


def test_candidates_share_the_route_of_their_context(routed):
    asked = [("w5 w6 w7 w8", " w9"), ("w5 w6 w7 w8", " w80 w81 w82 w83 w84 w85 w86"), ("w80 w81 w82", " w9 w10")]
    rows = routed._weights([routed.tok_encode(context) for context, _ in asked])
    names = routed.model.expert_names
    assert [names[max(range(len(row)), key=row.__getitem__)] for row in rows] == ["low", "low", "high"]
    for (context, continuation), row, (score, _) in zip(
        asked, rows, routed.loglikelihood(requests(*asked)), strict=True
    ):
        with routed.model.use_experts(torch.tensor(row)):
            ids = torch.tensor([routed.tok_encode(context + continuation)])
            logits = routed.model(input_ids=ids).logits[0].log_softmax(dim=-1)
        start = len(routed.tok_encode(context))
        expected = sum(logits[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))
        assert score == pytest.approx(expected, abs=1e-3)


def test_a_named_expert_scores_as_its_own_checkpoint_does(folder, routed):
    from transformers import AutoModelForCausalLM

    named = MediatorLM(routed.model, "high", routed.tokenizer, device="cpu")
    own = AutoModelForCausalLM.from_pretrained(folder / "high")
    expected = theirs((own, routed.tokenizer)).loglikelihood(requests(*PAIRS))
    ours = named.loglikelihood(requests(*PAIRS))
    # Norms are averaged in the backbone: near, not equal.
    torch.testing.assert_close(
        torch.tensor([s for s, _ in ours]), torch.tensor([s for s, _ in expected]), atol=0.5, rtol=0
    )


def test_mistakes_are_named(folder, plain, routed):
    with pytest.raises(RoutingError, match="low"):
        MediatorLM(routed.model, "lov", routed.tokenizer)
    with pytest.raises(HarnessError, match="plain model"):
        MediatorLM(plain[0], "low", plain[1])
    with pytest.raises(HarnessError, match="tokenizer"):
        MediatorLM(plain[0])
    with pytest.raises(HarnessError, match="reads 4 at once"):
        lm = MediatorLM(plain[0], tokenizer=plain[1], device="cpu", max_length=4)
        lm.loglikelihood(requests(("w5", " w6 w7 w8 w9 w10 w11")))
    with pytest.raises(HarnessError, match="no folder"):
        task_manager(["x"], folder / "nowhere")


TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["w8", "w70"]
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "own_generate": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["w3"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
""",
    "own_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture
def own_tasks(tmp_path):
    lines = [{"prompt": text, "answer": "w8"} for text in topic_texts(5, 40, 4, seed=1)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'items.jsonl'}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: test{text}")
    return tmp_path


def test_local_tasks_of_all_kinds_run_on_every_system(folder, own_tasks):
    shown = CliRunner().invoke(
        app,
        [
            *("eval", str(folder / "out"), "--lm-eval", ",".join(TASKS), "--include-path", str(own_tasks)),
            *("--baseline", f"base={folder / 'base'}", "--raw", "--json", "--device", "cpu"),
            *("--report", str(own_tasks / "report")),
        ],
    )
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert list(found) == ["base", "routed", "backbone", "expert low", "expert high", "expert base"]
    assert json.loads((own_tasks / "report" / "lm_eval.json").read_text()) == found
    for metrics in found.values():
        assert set(metrics) == set(TASKS)
        assert metrics["own_rolling"]["word_perplexity"] > 1
        assert 0 <= metrics["own_choice"]["acc"] <= 1
    perplexities = {name: metrics["own_rolling"]["word_perplexity"] for name, metrics in found.items()}
    # All prompts are of the first expert's topic: routed is that expert.
    assert perplexities["routed"] == pytest.approx(perplexities["expert low"], rel=1e-4)
    assert perplexities["expert high"] != pytest.approx(perplexities["expert low"], rel=2e-3)


def test_data_and_harness_tasks_exclude_each_other(folder):
    assert CliRunner().invoke(app, ["eval", str(folder / "out")]).exit_code == 2
    both = ["eval", str(folder / "out"), "--data", "a=b", "--lm-eval", "x"]
    assert CliRunner().invoke(app, both).exit_code == 2


@pytest.mark.slow  # reads the harness's own collection
def test_an_unknown_harness_task_is_named(own_tasks):
    with pytest.raises(HarnessError, match="own_choice"):
        task_manager(["own_choise"], own_tasks)


def test_it_is_a_model_of_the_harness_by_name():
    assert get_model("mediator") is MediatorLM
