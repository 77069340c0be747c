"""Scenarios: what is written is what is read, and whatever cannot work or would change nothing is refused by name."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from farflung.protocol.errors import ConfigError
from farflung.sim.bounds import default_of
from farflung.sim.changes import ALIASES, changed
from farflung.sim.draw import Draw
from farflung.sim.scenario import (
    Attack,
    Churn,
    Fault,
    Members,
    Model,
    Network,
    Run,
    Scenario,
    SharedLink,
)
from farflung.sim.scenario_checks import UNUSED
from farflung.sim.scenario_file import (
    field_name,
    field_types,
    load_scenario,
    parse_scenario,
    presets,
    scenario_folder,
    scenario_text,
    to_toml,
)

NAMES = [preset.name for preset in presets()]
ISSUE = {
    *("home-40", "campus", "two-datacentres", "covenant-20", "intellect-14"),
    *("straggler-4x", "churn-hourly", "attack-3-of-16", "lossy-30"),
    "liars",
}
KINDS: dict[str, type] = {
    "": Scenario,
    "run": Run,
    "model": Model,
    "members": Members,
    "members.churn": Churn,
    "network": Network,
    "network.link": SharedLink,
    "fault": Fault,
    "attack": Attack,
}

TIMING = """
name = "small"
rounds = 9
[model]
params = 1e9
tokens_per_step = 1000
[[members]]
count = 4
step_ms = 100
"""
TRAINING = """
name = "small"
fidelity = "training"
rounds = 9
[model]
task = "builtin:linear"
[[members]]
count = 4
step_ms = 100
"""


def read(text: str) -> Scenario:
    return parse_scenario(tomllib.loads(text), where="test")


def again(scenario: Scenario, *, full: bool) -> Scenario:
    return read(to_toml(scenario, full=full))


# -- presets ----------------------------------------------------------------------------------------------------------


def test_the_presets_are_those_that_were_asked_for():
    assert set(NAMES) == ISSUE


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_works_is_called_as_its_file_and_says_where_its_numbers_come_from(name):
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.summary
    assert scenario_text(name).startswith("# ")
    assert scenario_folder(name) is None
    assert (name, scenario.fidelity, scenario.summary) in presets()
    for full in (False, True):
        assert again(scenario, full=full) == scenario
    assert len(to_toml(scenario)) < len(to_toml(scenario, full=True))


def test_names_of_presets_keep_what_they_promise():
    home, attack, lossy = map(load_scenario, ("home-40", "attack-3-of-16", "lossy-30"))
    assert (home.size, home.model.params, home.members[0].up_mbit) == (40, 1e9, Draw("loguniform", (50, 500)))
    assert (attack.size, attack.attacks[0].count, attack.fidelity) == (16, 3, "training")
    assert (lossy.network.message_loss, lossy.fidelity) == (0.3, "training")
    assert load_scenario("covenant-20").size == 20
    assert load_scenario("intellect-14").size == 14
    slow = load_scenario("straggler-4x")
    assert slow.members[1].step_ms == Draw.fixed(4 * slow.members[0].step_ms.numbers[0])
    churn = load_scenario("churn-hourly").members[0].churn
    shape, scale = churn.session_s.numbers
    from math import gamma

    assert scale * gamma(1 + 1 / shape) == pytest.approx(3600, rel=0.01)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_found_by_its_path_and_named_after_it(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TIMING.replace('name = "small"\n', ""))
    assert load_scenario(path).name == "mine"
    assert load_scenario(str(path)) == load_scenario(path)
    assert scenario_folder(path) == tmp_path


@pytest.mark.parametrize(("name", "says"), [("home40", "home-40"), ("x/y.toml", "--list"), (".", "directory")])
def test_a_scenario_that_is_not_there_is_said_to_be_missing(name, says):
    with pytest.raises(ConfigError, match=says):
        load_scenario(name)


def test_a_number_is_a_fixed_draw_and_a_table_another():
    assert read(TIMING + "up_mbit = 7").members[0].up_mbit == Draw.fixed(7)
    assert read(TIMING + "up_mbit = { uniform = [5, 9.5] }").members[0].up_mbit == Draw("uniform", (5, 9.5))
    assert read(TIMING + "last_mile_ms = { exponential = 3 }").members[0].last_mile_ms == Draw("exponential", (3,))


@pytest.mark.parametrize("where", KINDS)
def test_an_unknown_key_is_named_with_its_table_and_the_nearest_one(where):
    churn = "\n[members.churn]\nsession_s = { weibull = [0.5, 9] }\ngap_s = 1\n"
    link = 'link = "cable"\n[[network.link]]\nname = "cable"\nup_mbit = 1\ndown_mbit = 1\n'
    tables = {
        "members.churn": churn,
        "network": "\n[network]\n",
        "network.link": link,
        "run": "\n[run]\n",
        "fault": '\n[[fault]]\nkind = "crash"\nat_s = 1\nmembers = [1]\n',
        "attack": '\n[[attack]]\nkind = "starve"\ncount = 1\n',
    }
    key = list(field_types(KINDS[where]))[-1]
    line = f"{key}x = 1\n"
    if where in ("", "model"):
        text = TIMING.replace("[model]\n", f"{line}[model]\n" if not where else f"[model]\n{line}")
    else:
        text = TIMING + tables.get(where, "") + line
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert f"did you mean '{key}'" in str(caught.value)
    assert (f"[{where}]" if where else "at the top") in str(caught.value)
    assert str(caught.value).endswith(f"'{key}x'")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('up_mbit = "fast"', "members.up_mbit must be a number or a draw"),
        ("up_mbit = { uniform = [9, 5] }", "[low, high]"),
        ("up_mbit = { gauss = [9, 5] }", "'gauss'"),
        ("up_mbit = { uniform = [1, 2], normal = [1, 2] }", "a draw such as"),
        ("reachable = 1", "members.reachable must be true or false, got 1"),
        ("jitter = true", "members.jitter must be a number, got True"),
        ("gpu = 4090", "members.gpu must be a text, got 4090"),
        ("churn = 3", "members.churn must be a table, got 3"),
        ('[network]\nregions = "eu"', "network.regions must be a list"),
        ("[run]\ninner_steps = 1.5", "run.inner_steps must be a whole number, got 1.5"),
        ("[[fault]]\nat_s = 3", "[fault] needs a key 'kind'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_path(line, says):
    with pytest.raises(ConfigError) as caught:
        read(f"{TIMING}{line}\n")
    assert says in str(caught.value)
    assert str(caught.value).startswith("test: ")


TEXTS = some.text(some.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = some.floats(1e-6, 1e12, allow_subnormal=False)
DRAWS = some.one_of(
    NUMBERS.map(Draw.fixed),
    some.tuples(NUMBERS, NUMBERS).map(lambda two: Draw("loguniform", tuple(sorted(two)))),
    some.lists(NUMBERS, min_size=1, max_size=4).map(lambda many: Draw("choice", tuple(many))),
)
PLAIN = some.recursive(
    some.one_of(some.booleans(), some.integers(-(2**63), 2**63 - 1), some.floats(allow_nan=False), TEXTS),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    draws=some.lists(DRAWS, min_size=4, max_size=4), number=NUMBERS, text=TEXTS, options=some.dictionaries(TEXTS, PLAIN)
)
def test_what_is_written_is_read_back(draws, number, text, options):
    churn = Churn("weibull", Draw("weibull", (0.5, number)), draws[0], crash=0.25)
    groups = (
        Members(3, "a", *draws[:2], queue="fifo", queue_ms=number, step_ms=draws[2], link="cable", churn=churn),
        Members(2, 'b "quoted"', reachable=False, step_ms=draws[3], region="eu", jitter=number),
    )
    network = Network(("us", "eu"), ((1.0, number), (number, 0.5)), (SharedLink("cable", number, 2 * number),))
    scenario = Scenario(
        "all.of-it",
        groups,
        Model(task="builtin:linear", options=options),
        summary=text,
        fidelity="training",
        network=network,
        faults=(Fault("link", 1.0, (1, 2), 0.5, number + 2), Fault("crash", 0.0, (4,))),
        attacks=(Attack("noise", (1,), strength=number), Attack("garbage", count=1)),
    )
    for full in (False, True):
        assert again(scenario, full=full) == scenario


def test_a_full_text_has_every_setting_that_can_be_written():
    text = to_toml(read(TIMING), full=True)
    for kind in (Scenario, Run, Model, Members, Network):
        for key, wanted in field_types(kind).items():
            table = (is_dataclass(wanted) and wanted is not Draw) or wanted in (dict[str, object], tuple[Members, ...])
            unwritten = table or default_of(make_one(kind), field_name(kind, key)) in ((), None)
            assert unwritten or re.search(rf"^{key} = ", text, re.MULTILINE), key


def make_one(kind: type) -> Any:
    return read(TIMING) if kind is Scenario else Members(step_ms=Draw.fixed(1)) if kind is Members else kind()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('[run]\ncodec = "zip"', "'zip'"),
        ('[run]\nrule = "krum"', "'krum'"),
        ('[run]\nouter = "adam"', "'adam'"),
        ('[run]\nweights = "wealth"', "'wealth'"),
        ('[run]\nexchange = "tree"', "'tree'"),
        ("[run]\ninner_steps = 0", "got 0"),
        ("[run]\nquorum_percent = 101", "got 101"),
        ("[run]\ndeadline_floor_s = 601.0", "got 601"),
        ("[run]\ngrace_s = -1.0", "got -1"),
        ('[run]\nrule = "median(f=2)"', "needs 5 members, got 4"),
        ('gpu = "rtx-4090"', "either gpu or step_ms"),
        ("mfu = 0.5", "belongs to a gpu"),
        ("queue_ms = 50", 'only with queue = "fifo"'),
        ('queue = "fifo"\nqueue_ms = 0', "got queue_ms 0"),
        ("busy_for_s = 60", "needs busy_every_s"),
        ("busy_every_s = 60", "needs busy_for_s"),
        ("busy_slowdown = 3", "needs busy_every_s"),
        ("busy_every_s = 60\nbusy_for_s = 6\nbusy_slowdown = 1", "above 1, got 1"),
        ("up_mbit = 0", "up_mbit must be above 0, got 0"),
        ("down_mbit = { choice = [5, 0] }", "got choice(5, 0)"),
        ("up_mbit = { uniform = [0, 0] }", "got uniform(0, 0)"),
        ("loss = 1", "got 1"),
        ("jitter = -0.1", "got -0.1"),
        ("jitter = inf", "got inf"),
        ("jitter = nan", "got nan"),
        ('region = "mars"', "'mars'"),
        ('link = "cable"', "'cable'"),
        ('[[network.link]]\nname = "cable"\nup_mbit = 1\ndown_mbit = 1', "nobody crosses"),
        ('[network]\nregions = ["a", "b"]', "2 rows of 2 numbers"),
        ('[network]\nregions = ["a", "a"]\nlatency_ms = [[1, 1], [1, 1]]', "twice 'a'"),
        ("[network]\nlatency_ms = [[-1]]", "got -1"),
        ("[network]\nheader_overhead = 0.9", "got 0.9"),
        ("[network]\nwindow_mb = 0", "got 0"),
        ("[[members]]\nstep_ms = 1", "twice 'member'"),
        ('[members.churn]\nkind = "poisson"', "'poisson'"),
        ("[members.churn]\nsession_s = { weibull = [0.5, 9] }", "churn.gap_s is missing"),
        ("[members.churn]\nsession_s = 5\ngap_s = 5", "churn.kind says how session_s is drawn"),
        ("[members.churn]\nsession_s = { weibull = [0.5, 9] }\ngap_s = 1\nlow = 0.2", "low is not read"),
        ('[members.churn]\nkind = "diurnal"\ngap_s = 1', "gap_s is not read"),
        ('[members.churn]\nkind = "diurnal"\nlow = 0.8\nhigh = 0.4', "got 0.8"),
        ('[members.churn]\nkind = "trace"', "set churn.trace"),
        ('[members.churn]\nkind = "trace"\ntrace = "a.csv"\ncrash = 0.5', "crash is not read"),
        ('[[fault]]\nkind = "flood"\nat_s = 1\nmembers = [1]', "'flood'"),
        ('[[fault]]\nkind = "crash"\nat_s = 1', "hits nobody"),
        ('[[fault]]\nkind = "crash"\nat_s = 1\nmembers = [4]', "from 0 to 3, got 4"),
        ('[[fault]]\nkind = "crash"\nat_s = 1\nmembers = [1, 1]', "twice 1"),
        ('[[fault]]\nkind = "crash"\nat_s = 1\nmembers = [1]\nfactor = 2', "factor is read by"),
        ('[[fault]]\nkind = "straggle"\nat_s = 1\nmembers = [1]', "above 1, got 1"),
        ('[[fault]]\nkind = "slow_disk"\nat_s = 1\nmembers = [1]\nfactor = 9', "a disk that is charged"),
        ('[[fault]]\nkind = "link"\nat_s = 1\nmembers = [1]', "not 1"),
        ('[[fault]]\nkind = "crash"\nat_s = 1e9\nmembers = [1]', "after the run's limit_h"),
        ('[[fault]]\nkind = "partition"\nat_s = 1\nmembers = [0, 1, 2, 3]', "cuts nothing"),
        ('[[attack]]\nkind = "straggle"', "either members or count"),
        ('[[attack]]\nkind = "straggle"\ncount = 4', "all but the founder"),
        ('[[attack]]\nkind = "starve"\ncount = 1\nstrength = 2', "0 to 1, got 2"),
        ('[[attack]]\nkind = "starve"\ncount = 1\nfrom_round = 10', "got from_round 10"),
        (2 * '[[attack]]\nkind = "starve"\nmembers = [1]\n', "twice 1"),
    ],
)
@pytest.mark.parametrize("base", [TIMING, TRAINING], ids=["timing", "training"])
def test_what_cannot_work_or_changes_nothing_is_refused_in_both_fidelities(base, line, says):
    with pytest.raises(ConfigError) as caught:
        read(f"{base}{line}\n")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("base", "line", "says"),
    [
        (TIMING, '[[attack]]\nkind = "sign_flip"\ncount = 1', 'use "training"'),
        (TIMING, '[[fault]]\nkind = "clock_skew"\nat_s = 1\nmembers = [1]', 'use "training"'),
        (TRAINING, '[[fault]]\nkind = "clock_skew"\nat_s = 1\nmembers = [1]\nfactor = 0', "changes nothing at 0"),
        (TRAINING, '[run]\nexchange = "ring"', "got 'ring'"),
        (TRAINING, '[[attack]]\nkind = "garbage"\ncount = 1\nstrength = 2', "strength is read by"),
        (TIMING.replace("params = 1e9", "params = 1e9\ntokens = 1e9"), "", "none is set"),
        (
            TIMING.replace("tokens_per_step = 1000", "").replace("rounds", "loss_goal = 3\nrounds"),
            "",
            "for its estimate",
        ),
        (TRAINING, '[[members]]\nname = "crowd"\ncount = 300\nstep_ms = 1', "got 304"),
        (TIMING.replace("params = 1e9", "params = 1e9\nlayers = 9"), "", "only matters for memory"),
        (TIMING.replace("params = 1e9", ""), "", "needs model.params"),
        (TIMING.replace("params = 1e9", "params = 1e9\noptions = { width = 4 }"), "", "set model.task"),
        (TIMING.replace("tokens_per_step = 1000", "").replace("step_ms = 100", 'gpu = "h100"'), "", "tokens_per_step"),
        (TIMING.replace("step_ms = 100", ""), "", "got neither"),
        (TIMING.replace("count = 4", "count = 0"), "", "1 to 100000, got 0"),
        (TIMING.replace("step_ms = 100", 'gpu = "abacus"'), "", "'abacus'"),
        (TIMING.replace("count = 4", "count = 1\njoin_after_s = 5"), "", "the founder"),
        (TIMING.replace('"small"', '"../up"'), "", "'../up'"),
        (TIMING.replace('"small"', '".."'), "", "'..'"),
        (TRAINING.replace('task = "builtin:linear"', ""), "", "needs model.task"),
        (TRAINING.replace('"builtin:linear"', '"linear"'), "", "module:object"),
        (TRAINING.replace("[model]", "[model]\ntokens_per_step = 5"), "", "none has one"),
    ],
)
def test_what_one_fidelity_cannot_use_is_refused_there(base, line, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        read(f"{base}{line}\n")


OTHER: dict[str, Any] = {
    "model.task": "builtin:linear",
    "model.options": {"width": 3},
    "model.tokens": 5.0,
    "run.weights": "steps(cap=5)",
    "run.mode": "push-sum",
    "members.clock_skew_s": Draw.fixed(1),
    "network.message_loss": 0.5,
}


def with_value(scenario: Scenario, part: str, name: str, value: Any) -> Scenario:
    if part == "members":
        return replace(scenario, members=(replace(scenario.members[0], **{name: value}),))
    return replace(scenario, **{part: replace(getattr(scenario, part), **{name: value})})


@pytest.mark.parametrize(("fidelity", "key"), [(fidelity, key) for fidelity, keys in UNUSED.items() for key in keys])
def test_a_setting_that_a_fidelity_does_not_use_is_refused_in_a_file_and_in_a_sweep(fidelity, key):
    scenario = read({"timing": TIMING, "training": TRAINING}[fidelity])
    part, name = key.split(".")
    with pytest.raises(ConfigError, match=r"changes nothing|set model\.task"):
        with_value(scenario, part, name, OTHER[key])
    if name != "options":
        same = getattr(scenario.members[0] if part == "members" else getattr(scenario, part), name)
        with pytest.raises(ConfigError, match="changes nothing"):
            changed(scenario, key, str(same))


# -- changes ----------------------------------------------------------------------------------------------------------


def test_a_change_changes_one_setting_of_all_groups_or_of_one():
    scenario = load_scenario("straggler-4x")
    both = changed(scenario, "uplink", "50")
    assert [group.up_mbit for group in both.members] == [Draw.fixed(50)] * 2
    one = changed(scenario, "members.slow.up_mbit", "uniform(5, 9)")
    assert [group.up_mbit for group in one.members] == [scenario.members[0].up_mbit, Draw("uniform", (5, 9))]
    assert replace(one, members=scenario.members) == scenario
    assert changed(scenario, "latency", "30").network.latency_ms == ((30.0,),)
    assert changed(scenario, "rounds", "3").rounds == 3
    assert changed(read(TRAINING), "model.options.width", "3").model.options == {"width": 3}
    flipped = load_scenario("attack-3-of-16")
    assert changed(flipped, "attack.0.strength", "5").attacks[0].strength == 5
    linked = changed(load_scenario("campus"), "network.link.library.up_mbit", "9")
    assert [link.up_mbit for link in linked.network.links] == [2500, 9]


def test_a_value_that_is_already_there_changes_nothing():
    for name in NAMES:
        scenario = load_scenario(name)
        assert changed(scenario, "codec", scenario.run.codec) == scenario
        assert changed(scenario, "H", str(scenario.run.inner_steps)) == scenario
        if len(scenario.members) == 1:
            assert changed(scenario, "uplink", str(scenario.members[0].up_mbit)) == scenario


@pytest.mark.parametrize("alias", ALIASES)
def test_a_short_name_leads_to_a_setting(alias):
    first, *rest = ALIASES[alias].split(".")
    table = first if len(rest) == 1 else f"{first}.{rest[0]}"
    assert rest[-1] in field_types(KINDS[table])


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("codek", "int8", "did you mean 'codec'"),
        ("bandwidth", "5", "short names are codec, rule"),
        ("run.codek", "int8", "did you mean 'codec'"),
        ("members.nobody.up_mbit", "5", "'nobody'"),
        ("members.even", "5", "'even'"),
        ("run", "5", "run is a table"),
        ("session", "5", "not a table with settings"),
        ("attackers", "1", "no [[attack]]"),
        ("uplink", "fast", "uplink=fast: members.up_mbit must be a number"),
        ("uplink", "0", "above 0"),
        ("H", "1.5", "whole number"),
        ("codec", "zip", "'zip'"),
        ("name.first", "x", "not a table"),
    ],
)
def test_a_change_that_cannot_be_made_says_why(key, text, says):
    with pytest.raises(ConfigError) as caught:
        changed(load_scenario("straggler-4x"), key, text)
    assert says in str(caught.value)


# -- documentation ----------------------------------------------------------------------------------------------------


def test_every_key_is_in_the_reference():
    text = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    for where, kind in KINDS.items():
        for key in field_types(kind):
            assert f"`{key}`" in text, f"{where}.{key}"
    for alias in ALIASES:
        assert f"`{alias}`" in text, alias
    for name in NAMES:
        assert f"`{name}`" in text, name


def test_every_field_says_what_it_is():
    source = Path(str(__import__("farflung.sim.scenario", fromlist=["x"]).__file__)).read_text()
    for kind in KINDS.values():
        if kind is SharedLink:
            continue
        body = source.split(f"class {kind.__name__}:")[1].split("\n\n\n")[0]
        for item in fields(kind):
            assert re.search(rf'    {item.name}: .*\n    """', body) or item.name in ("model", "run", "network"), (
                item.name
            )
