"""Lists of claims that somebody else has written: what can be used is used, what cannot is told by file, line and
remedy.
"""

from io import BytesIO

import pytest

from filao.sandbox.claims import BadClaimsError, claims_of, from_text


def test_a_list_is_read_with_its_bom_other_columns_and_quotes() -> None:
    content = b'\xef\xbb\xbfname, ClaimAmount ,IDpol\r\n"Durand, A.",12.345,7\r\n\r\nB,0,8.0\r\n'
    claims = claims_of("claims.csv", BytesIO(content), None)
    assert [(claim.number, claim.policy, claim.amount) for claim in claims] == [(1, 7, 1234), (3, 8, 0)]
    assert len(claims_of("claims.csv", BytesIO(content), 1)) == 1


@pytest.mark.parametrize(
    ("content", "key", "text"),
    [
        (b"", "empty", "is empty"),
        (b"a,b\n", "no_column", "has no column IDpol, ClaimAmount"),
        (b"IDpol,ClaimAmount\n", "no_claims", "no claim below them"),
        (b"IDpol,ClaimAmount\n1\n", "short_row", "line 2: has 1 of the columns"),
        (b"IDpol,ClaimAmount\n1,much\n", "no_number", "line 2: ClaimAmount is 'much'"),
        (b"IDpol,ClaimAmount\n1,nan\n", "no_number", "must be from 0"),
        (b"IDpol,ClaimAmount\n1.5,2\n", "not_whole", "not a whole number"),
        (b"IDpol,ClaimAmount\n1,\xe9\n", "encoding", "byte 0xe9 is not UTF-8"),
        (b'IDpol,ClaimAmount\n"1,2\n', "not_csv", "Is it a CSV file"),
        (b"IDpol,ClaimAmount\n" + b"1" * 70_000, "long_line", "is longer than"),
    ],
)
def test_a_list_that_cannot_be_used_is_told(content, key, text) -> None:
    with pytest.raises(BadClaimsError, match=text.replace("(", r"\(")) as raised:
        claims_of("claims.csv", BytesIO(content), None)
    assert raised.value.key == key
    assert "claims.csv" in str(raised.value)


def test_what_a_browser_could_not_decode_is_told_by_its_line() -> None:
    with pytest.raises(BadClaimsError, match="line 2"):
        from_text("claims.csv", "IDpol,ClaimAmount\n1,\N{REPLACEMENT CHARACTER}\n", 10)
    assert len(from_text("claims.csv", "IDpol,ClaimAmount\n1,2\n", 10)) == 1
