"""The command line declares queues."""

import filao
from tests.support.shell import compiled, db, run

__all__ = ["compiled", "db"]


def test_a_rule_that_cannot_be_is_refused_before_a_file_is_created(tmp_path):
    ran = run("declare", tmp_path / "claims.db", "claims", "--lease", "-1")
    assert ran.code == 3
    assert "lease is -1.0; it must be a number of seconds from 0.001 to 604800" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_declare_prints_the_rules(tmp_path):
    (rules,) = run("declare", tmp_path / "claims.db", "claims", "--lease", "60", "--backoff-first", "2").lines
    assert rules["name"] == "claims"
    assert (rules["lease"], rules["max_attempts"]) == (60.0, 5)
    assert rules["backoff"] == {"first": 2.0, "factor": 2.0, "ceiling": 300.0, "jitter": 0.5}


def test_declare_keeps_the_rules_that_are_not_given(db):
    run(
        "declare",
        db,
        "claims",
        "--ttl",
        "60",
        "--max-attempts",
        "3",
        "--backoff-factor",
        "3",
        "--overflow",
        "drop_oldest",
    )
    (rules,) = run("declare", db, "claims", "--lease", "90", "--ttl", "none", "--backoff-jitter", "0").lines
    assert (rules["lease"], rules["ttl"], rules["max_attempts"], rules["overflow"]) == (90.0, None, 3, "drop_oldest")
    assert (rules["backoff"]["factor"], rules["backoff"]["jitter"]) == (3.0, 0.0)


def test_every_rule_has_an_option():
    shown = run("declare", "--help").out.decode()
    for rule in filao.Queue.__dataclass_fields__:
        if rule not in ("name", "body", "_", "backoff"):
            assert f"--{rule.replace('_', '-')} " in shown
    for part in filao.Backoff.__slots__:
        assert f"--backoff-{part} " in shown
