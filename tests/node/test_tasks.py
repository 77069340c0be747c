"""Tasks are named, checked and described; the built-in ones give the same data and start everywhere."""

import sys
import types
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from farflung.node.data import Sharder, solo_view
from farflung.node.flat import read_parameters, schema_of
from farflung.node.tasks import Task, bits_per_byte, count_tokens, describe_task, load_described, load_task
from farflung.node.tasks.corpus import Windows, read_corpus
from farflung.protocol.canonical import encode_canonical
from farflung.protocol.errors import ConfigError

TINY = {"layers": 1, "width": 32, "context": 32, "batch": 4, "validation_windows": 8}
BUILTIN = [("builtin:stdlib-gpt", TINY), ("builtin:linear", {}), ("builtin:stub", {"params": 1200, "tensors": 3})]


def flat_of(model: nn.Module) -> torch.Tensor:
    out_d = torch.empty(schema_of(model).numel)
    read_parameters(model, out_d)
    return out_d


@pytest.mark.parametrize(("name", "options"), BUILTIN)
def test_every_builtin_task_keeps_the_contract(name, options):
    task = load_task(name, options)
    assert isinstance(task, Task)
    model = task.build_model()
    assert torch.equal(flat_of(model), flat_of(task.build_model()))
    optimizer = task.build_optimizer(model)
    before_d = flat_of(model)
    batches = list(islice(task.batches(Sharder(solo_view(3))), 2))
    assert str(batches) == str(list(islice(task.batches(Sharder(solo_view(3))), 2)))
    assert str(batches) != str(list(islice(task.batches(Sharder(solo_view(3, me=1, of=2))), 2)))
    for batch in batches:
        task.loss(model, batch).backward()
        optimizer.step()
        assert task.tokens(batch) >= 1
    assert not torch.equal(before_d, flat_of(model))
    assert task.evaluate(model) == task.evaluate(model)


@pytest.mark.parametrize(("name", "options"), BUILTIN)
def test_a_description_is_canonical_and_leads_back_to_the_task(name, options):
    task = load_task(name, options)
    description = describe_task(name, options, task=task)
    assert encode_canonical(description) == encode_canonical(describe_task(name, options, task=task))
    assert load_described(description, builtin_only=True) == task
    assert "seed" in description["options"], "defaults are written out"


def test_building_a_task_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    for name, options in BUILTIN:
        load_task(name, options).build_model()
    assert torch.equal(before, torch.get_rng_state())


class Half:
    def build_model(self) -> None: ...

    def loss(self, model: object, batch: object) -> None: ...


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("builtin:nothing", {}, "builtin:linear"),
        ("noname", {}, "module:object"),
        ("no_such_module_here:task", {}, "PYTHONPATH"),
        ("no_such.module_here:task", {}, "PYTHONPATH"),
        ("json:task", {}, "no task 'task'"),
        ("subprocess:Popen", {"args": "true"}, "lacks the methods"),
        ("task_of_tests:Half", {}, "build_optimizer, batches"),
        ("task_of_tests:whole", {"size": 1}, "no options"),
        ("builtin:linear", {"featurs": 3}, "featurs.*it knows: features"),
        ("builtin:linear", {"batch": 0}, "at least 1"),
        ("builtin:stdlib-gpt", {"lr": float("nan")}, "lr"),
        ("builtin:stub", {"params": 10, "tensors": 3}, "multiple"),
    ],
)
def test_a_wrong_name_method_or_option_says_what_to_change(name, options, message, monkeypatch):
    module = types.ModuleType("task_of_tests")
    module.Half, module.whole = Half, load_task("builtin:linear")
    monkeypatch.setitem(sys.modules, "task_of_tests", module)
    with pytest.raises(ConfigError, match=message):
        load_task(name, options)


def test_a_task_module_that_fails_or_lacks_something_says_so(tmp_path, monkeypatch):
    (tmp_path / "task_that_fails.py").write_text("1 / 0\n")
    (tmp_path / "task_that_lacks.py").write_text("import no_such_package_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_task("task_that_fails:x")
    with pytest.raises(ConfigError, match="not installed: no_such_package_here"):
        load_task("task_that_lacks:x")


def test_a_genesis_cannot_import_code_that_nobody_here_named():
    with pytest.raises(ConfigError, match="name the task yourself"):
        load_described({"name": "os:abort", "options": "{}"}, builtin_only=True)
    for wrong in (None, {}, {"name": "builtin:linear", "options": "["}, {"name": "builtin:linear", "options": "[]"}):
        with pytest.raises(ConfigError):
            load_described(wrong)
    with pytest.raises(ConfigError, match="plain data"):
        describe_task("a:b", {"x": float("nan")})


def test_the_corpus_is_deterministic_and_its_parts_are_apart():
    corpus = read_corpus()
    read_corpus.cache_clear()
    again = read_corpus()
    assert corpus.digest == again.digest
    assert np.array_equal(corpus.train, again.train)
    assert len(corpus.train) > 4_000_000
    assert 0.005 < len(corpus.validation) / len(corpus.train) < 0.06
    assert b"import " in corpus.validation.tobytes()


def test_the_corpus_takes_sources_in_path_order_and_leaves_out_packages_and_tests(tmp_path):
    for index in range(120):
        (tmp_path / f"m{index:03}.py").write_text(f"x = {index}\n")
    before = read_corpus(str(tmp_path))
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("y = 1\n")
    (tmp_path / "_sysconfigdata_here.py").write_text("z = 1\n")
    read_corpus.cache_clear()
    assert read_corpus(str(tmp_path)).digest == before.digest
    assert before.files == 120
    (tmp_path / "m000.py").write_text("x = 1\n")
    read_corpus.cache_clear()
    assert read_corpus(str(tmp_path)).digest != before.digest
    with pytest.raises(ConfigError, match="no Python source"):
        read_corpus(str(tmp_path / "site-packages" / "nothing"))


def test_windows_cover_the_text_and_every_byte_is_a_target_once():
    windows = Windows(np.arange(101, dtype=np.uint8), 10)
    assert len(windows) == 10
    targets = torch.cat([windows[index][1:] for index in range(10)])
    assert torch.equal(targets, torch.arange(1, 101))
    with pytest.raises(ConfigError, match="longer"):
        Windows(np.arange(10, dtype=np.uint8), 10)


def test_the_gpt_starts_at_uniform_guessing_and_cannot_see_the_future():
    task = load_task("builtin:stdlib-gpt", TINY)
    model = task.build_model()
    assert 7.8 < bits_per_byte(task.evaluate(model)) < 8.2
    text = torch.arange(32)[None]
    changed = text.clone()
    changed[0, 20:] = 7
    assert torch.equal(model(text)[0, :20], model(changed)[0, :20])
    assert not torch.equal(model(text)[0, 20:], model(changed)[0, 20:])


def test_a_sample_follows_from_parameters_prompt_and_seed():
    task = load_task("builtin:stdlib-gpt", TINY)
    model = task.build_model()
    text = task.sample(model, "def ", length=40)
    assert text.startswith("def ")
    assert text == task.sample(model, "def ", length=40)
    assert text != task.sample(model, "def ", length=40, seed=1)
    assert task.sample(model, "", length=1)


def test_the_default_gpt_has_the_size_it_says():
    assert sum(part.numel() for part in load_task("builtin:stdlib-gpt").build_model().parameters()) == 836_736


def test_the_stub_moves_every_parameter_differently_for_every_member():
    task = load_task("builtin:stub", {"params": 3_000_000, "tensors": 2})
    moved = []
    for me in range(2):
        model = task.build_model()
        before_d = flat_of(model)
        optimizer = task.build_optimizer(model)
        batch = next(task.batches(Sharder(solo_view(me=me, of=2))))
        task.loss(model, batch).backward()
        optimizer.step()
        moved.append(flat_of(model) - before_d)
        assert (moved[-1] != 0).float().mean() > 0.999
    assert abs(torch.corrcoef(torch.stack(moved))[0, 1]) < 0.01


def test_linear_regression_can_be_solved_exactly():
    task = load_task("builtin:linear", {"features": 16, "samples": 8})
    x_nd, y_n = task.data()
    model = task.build_model()
    with torch.no_grad():
        model.weight.copy_((torch.linalg.pinv(x_nd) @ y_n)[None])
    assert task.evaluate(model) < 1e-10


def test_tokens_are_counted_in_the_usual_batches_and_asked_for_otherwise():
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert count_tokens(ids) == count_tokens({"input_ids": ids}) == count_tokens((ids, None)) == 10
    with pytest.raises(ConfigError, match="tokens"):
        count_tokens("text")
