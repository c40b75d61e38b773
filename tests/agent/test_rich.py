"""MIME bundles of values, in real sessions with and without IPython (M6: rich results)."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fumehood.agent import rich, wire

from .session_driver import Client, Zygote

pytestmark = pytest.mark.data
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", params=[["pandas", "matplotlib"], ["no-ipython"]], ids=["notebook", "plain"])
def zygote(request: pytest.FixtureRequest) -> Iterator[Zygote]:
    made = Zygote(request.param)
    yield made
    made.close()


@pytest.fixture
def session(zygote: Zygote, tmp_path: Path) -> Iterator[Client]:
    client = zygote.session(tmp_path)
    yield client
    client.close()


def test_a_data_frame_is_text_html_and_columns(session: Client):
    answer = session.run(
        "import pandas as pd\n"
        "pd.DataFrame({'n': [1, 2], 'x': [0.5, float('nan')], 's': ['a', None], 't': pd.to_datetime(['2024-01-02', None])})"
    )
    assert "<table" in answer.main["text/html"] and "0.5" in answer.main["text/plain"]
    data = answer.main[rich.DATA]
    assert data == {"n": [1, 2], "x": [0.5, None], "s": ["a", None], "t": ["2024-01-02T00:00:00", None]}


def test_a_frame_with_one_name_twice_and_odd_cells_still_has_its_columns(session: Client):
    code = "import pandas as pd, decimal\npd.DataFrame([[1, {1: 2}], [(3,), decimal.Decimal('4')]], columns=['a', 'b'])"
    assert session.run(code).main[rich.DATA] == {"a": [1, [3]], "b": [{"1": 2}, "4"]}


def test_a_large_frame_travels_as_text_and_html_only(session: Client):
    answer = session.run("import pandas as pd\npd.DataFrame({'a': range(100_001)})")
    assert rich.DATA not in answer.main and "100001 rows" in answer.main["text/plain"]


@pytest.mark.parametrize("value", ["{'a': [1, None]}", "[1, 'x', {'b': 2.5}]"])
def test_dicts_and_lists_are_json_too(session: Client, value: str):
    answer = session.run(value)
    assert answer.main["application/json"] == eval(value)
    assert answer.main["text/plain"] == value


@pytest.mark.parametrize("made", ["list({})", "[list({})]", "tuple({})", "set({})", "dict.fromkeys({})"])
def test_what_a_frame_can_not_hold_is_a_text_that_says_so(session: Client, made: str):
    main = session.run(made.format(f"range({wire.MAX_JSON_ITEMS})")).main
    assert list(main) == ["text/plain"] and "left out" in main["text/plain"]


@pytest.mark.parametrize("code", ["[float('nan')]", "[object]", "{1: {2}}", "a = []\na.append(a)\na"])
def test_what_json_can_not_hold_is_text_only(session: Client, code: str):
    assert list(session.run(code).main) == ["text/plain"]


def test_show_makes_a_picture_with_its_chart_and_closes_the_figure(session: Client):
    answer = session.run("import matplotlib.pyplot as plt\nplt.plot([1, 2], [3, 4])\nplt.show()\nprint(plt.get_fignums())")
    (result,) = answer.results
    assert base64.b64decode(result["image/png"]).startswith(PNG_HEAD)
    assert result[rich.CHART]["type"] == "line"
    assert (answer.stdout, answer.stderr) == ("[]\n", "")


def test_a_figure_left_open_is_shown_at_the_end_of_the_cell_and_once(session: Client):
    answer = session.run("import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.bar(['a'], [1])\nNone")
    assert [r[rich.CHART]["type"] for r in answer.results] == ["bar"]
    assert session.run("None").results == []
    assert len(session.run("plt.plot([1])\nplt.figure()\nplt.plot([2])\nNone").results) == 2


def test_a_figure_left_open_by_a_failing_cell_is_shown_too(session: Client):
    answer = session.run("import matplotlib.pyplot as plt\nplt.plot([1, 2])\n1 / 0")
    assert (answer.outcome, session.run("plt.get_fignums()").main["text/plain"]) == ("error", "[]")


def test_code_that_chose_a_backend_without_a_screen_still_shows_its_figures(session: Client):
    code = "import matplotlib\nmatplotlib.use('Agg')\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nNone"
    assert "image/png" in session.run(code).results[0]


def test_fig_show_makes_a_result(session: Client):
    answer = session.run("import matplotlib.pyplot as plt\nf = plt.figure()\nplt.plot([1])\nf.show()\nplt.close(f)")
    assert len(answer.results) == 1


def test_a_program_that_the_session_starts_inherits_no_backend(session: Client):
    assert session.run("import matplotlib.pyplot, os\n'MPLBACKEND' in os.environ").main["text/plain"] == "False"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK", "F", "1", "P"])
def test_a_pil_image_is_a_png(session: Client, mode: str):
    answer = session.run(f"from PIL import Image\nImage.new({mode!r}, (3, 2))")
    assert base64.b64decode(answer.main["image/png"]).startswith(PNG_HEAD)
    assert "image/jpeg" not in answer.main


def test_the_notebook_protocol_is_honoured(session: Client):
    answer = session.run(
        "class V:\n"
        "    def __repr__(self): return 'V!'\n"
        "    def _repr_html_(self): return '<b>V</b>'\n"
        "    def _repr_markdown_(self): return '**V**'\n"
        "    def _repr_latex_(self): return '$V$'\n"
        "    def _repr_svg_(self): return '<svg/>'\n"
        "    def _repr_png_(self): return b'png'\n"
        "    def _repr_jpeg_(self): return None\n"
        "    def _repr_pdf_(self): return b'%PDF'\n"
        "V()"
    )
    assert answer.main == {
        "text/plain": "V!",
        "text/html": "<b>V</b>",
        "text/markdown": "**V**",
        "text/latex": "$V$",
        "image/svg+xml": "<svg/>",
        "image/png": base64.b64encode(b"png").decode(),
        "application/pdf": base64.b64encode(b"%PDF").decode(),
    }
    assert "text/html" not in session.run("V").main


def test_a_mime_bundle_is_taken_and_made_fit_for_json(session: Client):
    answer = session.run(
        "class V:\n    def _repr_mimebundle_(self, **kw): return {'text/plain': 'b', 'application/x': {'n': float('nan')}}\nV()"
    )
    assert answer.main == {"text/plain": "b", "application/x": {"n": None}}


def test_a_repr_that_raises_is_an_error_and_the_session_lives_on(session: Client):
    answer = session.run("class V:\n    def __repr__(self): raise KeyError('no')\nV()")
    assert (answer.outcome, answer.error["name"]) == ("error", "KeyError")
    assert session.run("1").main["text/plain"] == "1"


def test_a_result_over_a_frames_size_is_replaced_by_a_text_that_says_so(session: Client):
    answer = session.run("'x' * 20_000_000")
    assert "result of 200" in answer.main["text/plain"] and len(answer.main["text/plain"]) < 200
    assert session.run("1").main["text/plain"] == "1"


def test_the_structured_copy_goes_before_the_text_when_both_are_too_much(session: Client):
    answer = session.run("['x' * 9_000_000]")
    assert list(answer.main) == ["text/plain"] and len(answer.main["text/plain"]) > 9_000_000


def test_an_error_text_over_a_frames_size_is_cut_and_the_session_lives_on(session: Client):
    answer = session.run("raise ValueError('x' * 20_000_000)")
    assert answer.error["name"] == "ValueError" and len(answer.error["value"]) < 2_000_000
    assert session.run("1").main["text/plain"] == "1"


@pytest.mark.parametrize("value", [b"\0\xff", float("inf"), {1: {2}}, object, [b"x"]])
def test_every_bundle_value_encodes_as_strict_json(value: Any):
    event = rich.result_event({"text/plain": value}, main=True)
    assert b"NaN" not in (frame := wire.encode_json(1, wire.EVENT, event)) and b"Infinity" not in frame
