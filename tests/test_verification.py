"""`hgpo_trl.verification`: when two answers are equal, real answers, stuck samples, processes and threads."""

import ast
import cmath
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from verifier_hooks import crash_on_five, sleep_on_five

from hgpo_trl.verification import check_answers, exact, spelling, values, workers


def equal(reference: str, answer: str) -> bool | None:
    return check_answers([reference], [answer])[0]


# --- Equality -----------------------------------------------------------------

EQUAL = {
    "numbers": [
        ("4", "4."),
        ("4", "+4"),
        ("142.0", "142"),
        ("007", "7"),
        ("0", "-0"),
        ("0.5", ".5"),
        ("0.5", "1/2"),
        ("123456789012345678901234567890", "123456789012345678901234567890.0"),
    ],
    "thousands": [
        ("1,000", "1000"),
        ("1000", "1,000"),
        ("1234567", "The total is 1,234,567."),
        ("10,\\!080", "10080"),
        ("10080", "10,\\!080"),
        ("10,\\!080", "$10{,}080$"),
        ("11,\\! 111,\\! 111,\\! 100", "\\boxed{11111111100}"),
        ("(3,100)", "$(3, 100)$"),
    ],
    "fractions": [
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{1}{2}", "\\dfrac{1}{2}"),
        ("\\frac12", "\\frac{1}{2}"),
        ("-\\frac{1}{2}", "\\frac{-1}{2}"),
        ("1\\frac{4}{5}", "\\frac{9}{5}"),
        ("137 \\frac{1}{2}", "137.5"),
    ],
    "degrees": [("90^\\circ", "90"), ("90", "90^\\circ"), ("90^\\circ", "90 degrees")],
    "text": [
        ("\\text{Evelyn}", "Evelyn"),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}"),
        ("\\text{Evelyn}", "\\boxed{Evelyn}"),
        ("\\text{(C)}", "C"),
        ("\\text{(C)}", "\\boxed{C}"),
        ("Paris", "**Paris**."),
        ("\\text{Evelyn}", "**Evelyn**"),
        ("Paris", "$\u00a0Paris\u3000$"),
    ],
    "intervals": [
        ("(3,4]", "(3, 4]"),
        ("(3,4]", "\\left(3,4\\right]"),
        ("(-\\infty,2)", "\\left(-\\infty, 2\\right)"),
        ("(0,9) \\cup (9,36)", "\\boxed{(0,9)\\cup(9,36)}"),
        ("x \\in [-2,7]", "[-2,7]"),
    ],
    "tuples, lists and matrices": [
        ("(6,31,-1)", "(6, 31, -1)"),
        ("(6,31,-1)", "$(6, 31, -1)$."),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"),
        ("1,-2", "-2,1"),
        ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}"),
        ("\\begin{pmatrix} 1 \\\\ 3 \\end{pmatrix}", "\\begin{pmatrix}1\\\\3\\end{pmatrix}"),
    ],
    "expressions": [
        ("2\\sqrt{113}", "2 \\sqrt{113}"),
        ("2\\sqrt{113}", "**$\\sqrt{452}$**"),
        ("6+9i", "9i+6"),
        ("p - q", "-q+p"),
        ("y = 2x + 3", "y=2x+3"),
        ("1000", "10^{3}"),
        ("x=5", "5"),
    ],
    "units and money": [
        ("5 \\text{ cm}", "5"),
        ("5", "5 cm"),
        ("5", "\\boxed{5\\text{ miles}}"),
        ("864 \\mbox{ inches}^2", "864"),
        ("18", "$18"),
        ("18", "18 dollars"),
        ("18", "She makes $18 every day."),
        ("18", "She makes \\$18 every day."),
        ("15", "She makes $18 - $3 = $15 a day."),
        ("\\$18.90", "$18.9"),
        ("\\$32,\\!348", "\\boxed{32348}"),
    ],
    "number bases": [("1011_2", "1011_{2}"), ("1011_2", "\\boxed{1011_2}"), ("4A_{16}", "The answer is $4A_{16}$.")],
    "lists as text": [
        ("['2']", "2"),
        ("['$\\\\frac{1}{2 n+2}$']", "\\frac{1}{2n+2}"),
        ("['$1$,$2$']", "\\boxed{2, 1}"),
        ("['$3$', '$4$']", "The answers are $3$ and $4$."),
    ],
    "LaTeX after prose": [
        ("\\frac{3}{4}", "The answer is \\frac{3}{4}"),
        ("\\frac{3}{4}", "So, the final answer is \\frac{6}{8}."),
        ("3\\sqrt{13}", "The answer is 3\\sqrt{13}."),
        ("(2,3)", "The answer is: (2, 3)."),
        ("\\text{(B)}", "The answer is (B)."),
        ("\\text{Evelyn}", "The answer is Evelyn."),
        ("\\text{Evelyn}", "evelyn"),
        ("18", "16 - 3 - 4 = 9, times 2.\n#### 18"),
    ],
    "percentages": [("10\\%", "10%"), ("10", "10%"), ("10\\%", "\\boxed{10}"), ("50\\%", "\\frac{1}{2}")],
    "prose": [
        ("4", "The answer is 4, because 2+2 is."),
        ("4", "**Answer:** 4"),
        ("\\frac{1}{2}", "Half of it:\n\n\\[ x = \\frac{1}{2} \\]"),
        ("4", "First I get $5$, but then \\(9 - 5 = 4\\)."),
        ("4", "The answer is $\\boxed{4}$, not 5."),
        ("4", "The final answer is $5$. I hope it is correct. No: \\boxed{4}"),
        ("4", "\\[4\\]"),
        ("4", "$a = 3$\n$b = 4$"),
        ("4", "3\n4"),
    ],
}

UNEQUAL = {
    "numbers": [
        ("4", "5"),
        ("4", "14"),
        ("4", "-4"),
        ("4", "4.1"),
        ("1", "0.99999999"),
        ("123456789012345678901234567890", "123456789012345678901234567891"),
        ("\\pi", "3.14"),
        ("\\frac13", "0.33"),
    ],
    "a number that only stands in the answer": [
        ("3", "3\\sqrt{13}"),
        ("3", "**3\\sqrt{13}**"),
        ("10", "10^{3}"),
        ("9", "9i+6"),
        ("4", "$4\\pi$"),
        ("2", "1, 2"),
        ("5", "(2, 5)"),
        ("3", "\\{1, 2, 3\\}"),
        ("486", "\\begin{pmatrix} -1215 \\\\ 486 \\end{pmatrix}"),
        ("4", "4 or 5"),
        ("4", "\\boxed{4} \\boxed{5}"),
        ("4", "\\boxed{4}, \\boxed{5}"),
        ("4", "It may be 1, 2, 3 or 4."),
        ("12", "1 2"),
        ("4", "\\boxed{4, 5}"),
        ("4", "The answer is $4$ or $5$."),
        ("4", "The answer is $5$ or $4$."),
        ("4", "The answer is 5, or 4."),
        ("4", "The answer is $4$, $5$, $6$, $7$, $8$, $9$, $10$, $11$."),
        ("4", "1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("4", "The answer is 4.\n\nNo, the answer is 5."),
        ("\\text{(C)}", "A, B, C, D"),
        ("\\text{Yes}", "Yes or no"),
    ],
    "thousands": [("1,000", "1"), ("10,\\!080", "80"), ("(3,100)", "3100")],
    "nothing": [("4", ""), ("4", "no idea"), ("4", "\\boxed{}"), ("\\text{Evelyn}", "")],
    "text": [("\\text{Evelyn}", "Carla"), ("\\text{(C)}", "\\boxed{D}"), ("Yes", "No")],
    "intervals and tuples": [
        ("(3,4]", "(3,4)"),
        ("(3,4]", "[3,4)"),
        ("[1,2]", "(1,2)"),
        ("(1,2)", "(2,1)"),
        ("1,2", "1"),
        ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}"),
    ],
    "expressions": [("x^2", "x^3"), ("p - q", "q - p"), ("6+9i", "6-9i"), ("y=2x+3", "y=2x+4"), ("2:3", "3:2")],
    "number bases": [
        ("1011_2", "1011"),
        ("1011_2", "\\boxed{1011}"),
        ("11", "1011_2"),
        ("1011_2", "1011_3"),
        ("1011_2", "\\boxed{1010_2}"),
    ],
    "near misses": [
        ("(2,3)", "(3,2)"),
        ("(2,3)", "[2,3]"),
        ("(2,3)", "\\boxed{[2,3]}"),
        ("[2,3]", "(2,3)"),
        ("(2,3)", "2.3"),
        ("\\frac12", "0.6"),
        ("\\frac12", "\\frac21"),
        ("1\\frac12", "\\frac{11}{2}"),
        ("-5", "5"),
        ("5", "-5"),
        ("x=5", "y=5"),
        ("x=5", "x=-5"),
        ("5^2", "52"),
        ("5!", "5"),
        ("2^{10}", "210"),
        ("\\sqrt{2}", "2"),
        ("['$1$,$2$']", "1"),
        ("['3', '4']", "\\boxed{3}"),
    ],
    "units": [("\\$18.90", "18.91"), ("10\\%", "11\\%"), ("90^\\circ", "91^\\circ")],
}


def pairs(cases: dict[str, list[tuple[str, str]]]) -> list[Any]:
    return [pytest.param(*pair, id=f"{topic}: {pair[0]} | {pair[1]}") for topic in cases for pair in cases[topic]]


@pytest.mark.parametrize(("reference", "answer"), pairs(EQUAL))
def test_equal(reference: str, answer: str) -> None:
    assert equal(reference, answer)


@pytest.mark.parametrize(("reference", "answer"), pairs(UNEQUAL))
def test_unequal(reference: str, answer: str) -> None:
    assert not equal(reference, answer)


@settings(max_examples=100)
@given(reference=st.decimals(allow_nan=False, allow_infinity=False, places=3), answer=st.integers(-10, 10))
def test_numbers_are_compared_exactly(reference: Any, answer: int) -> None:
    assert equal(f"{reference:f}", str(answer)) == (reference == answer)
    assert equal(f"{reference:,f}", f" ${reference:f}$. ")


@settings(max_examples=50)
@given(
    reference=st.sampled_from(["4", "\\frac{1}{2}", "\\text{even}"]),
    answer=st.text("4 \\{}$()[]^_.,/=+-%afrctex", max_size=20),
)
def test_no_answer_raises(reference: str, answer: str) -> None:
    assert equal(reference, answer) in (True, False)


@pytest.mark.parametrize(
    "answer",
    [
        "9" * 1_000_000,
        "\\boxed{" + "9" * 1_000_000 + "}",
        "." * 1_000_000 + "x",
        " " * 1_000_000 + "x",
        "(" * 1_000_000,
        "\\frac{" * 200_000,
        "\\boxed{" * 150_000,
        "\\boxed{5}, " * 100_000,
        "a 5 " * 250_000,
        "$x$ and " * 125_000,
        "The answer is 5 " * 60_000,
        "answer" + " " * 1_000_000 + "is 5",
        "1," * 500_000,
        "(1," * 600,
        "\\text{" + "." * 1_900,
        "1+10^{-29000}" + "".join(f"+{base}^{{\\pi}}" for base in range(2, 40)),
        "1+10^{-29000}" + "".join(f"+\\sin({x})" for x in range(2, 40)),
        "+".join(f"\\frac{{1}}{{{base}^{{60000}}}}" for base in range(3, 23, 2)),
        "*".join(f"{base}^{{50000}}" for base in range(3, 30)),
        "(((((2^{100})^{100})^{100})^{100})^{100})",
        "x!^{1000}",
    ],
    ids=lambda answer: f"{answer[:9]!r} x {len(answer)}",
)
def test_a_degenerate_answer_is_wrong_and_cheap(answer: str) -> None:
    """A policy in a loop; Python refuses to make a number of more than 4,300 digits."""
    start = time.process_time()  # of this process alone, whatever else the machine does
    assert not equal("4", answer)
    assert time.process_time() - start < 60


# --- Real answers -------------------------------------------------------------

FILES = ("math_train", "aime_train", "math500_test", "aime24_test", "amc_test", "olympiadbench_test", "gsm8k_test")
FORMS = ("{}", "The answer is ${}$.", "The answer is {}.", "Some thoughts ... so the answer is $\\boxed{{{}}}$.")
# Another row's answer that is equal all the same: a unit, a per cent sign or the unknown's name is no part of it.
KNOWN_EQUAL = {
    ("8", "K=8"),
    ("25\\%", "25"),
    ("120", "120^\\circ"),
    ("21\\text{ dogs}", "21"),
    ("18 \\text{ degrees}", "18"),
    ("5", "x=5"),
}


def gold_answers(shared_data: Path, name: str) -> list[str]:
    rows = json.loads((shared_data / f"{name}.json").read_text(encoding="utf-8"))
    return [str(row["answer"]) for row in rows if row["answer"] not in (None, "")]  # math_train has four rows without


def as_answer(gold: str) -> str:
    """OlympiadBench gives lists as text: what a model would write is their entries."""
    return ", ".join(ast.literal_eval(gold)).replace("$", "") if gold[:2] in ("['", '["') else gold


@pytest.mark.parametrize("name", FILES)
def test_every_real_answer_equals_itself(shared_data: Path, name: str) -> None:
    cases = [(gold, form.format(as_answer(gold))) for gold in gold_answers(shared_data, name) for form in FORMS]
    verdicts = check_answers(*zip(*cases, strict=True))
    assert [case for case, verdict in zip(cases, verdicts, strict=True) if verdict is not True] == []


@pytest.mark.parametrize("name", FILES)
def test_other_real_answers_are_wrong(shared_data: Path, name: str) -> None:
    """Each row's answer against the next different one; of the 7,470 of math_train, the 1,500 last."""
    golds = gold_answers(shared_data, name)[-1500:]
    following = [next(other for other in golds[i + 1 :] + golds if other != gold) for i, gold in enumerate(golds)]
    cases = list(zip(golds, following, strict=True))
    verdicts = check_answers(golds, [f"So it is $\\boxed{{{as_answer(other)}}}$." for other in following])
    assert {case for case, verdict in zip(cases, verdicts, strict=True) if verdict is not False} <= KNOWN_EQUAL


# --- Batches ------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["4", "\\frac{1}{2}", "\\text{even}", "(1,2)", "1,2", "['2']", "x+1"]),
            st.sampled_from(["4", "0.5", "even", "(1, 2)", "2,1", "1+x", "\\boxed{2}", "\\frac{", "It is $4$ here."])
            | st.text("4 \\{}$()[]^_.,/=+-%afrctex", max_size=20),
        ),
        max_size=12,
    )
)
def test_a_batch_equals_one_by_one(pairs: list[tuple[str, str]]) -> None:
    verdicts = check_answers([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    assert verdicts == [equal(*pair) for pair in pairs]


@settings(max_examples=200)
@given(reference=st.text(max_size=40), answer=st.text(max_size=200))
def test_the_exact_rungs_take_any_text(reference: str, answer: str) -> None:
    assert exact.settle(reference, answer)[0] in (True, False, None)
    assert exact.settle(reference, f" ${reference}$. ")[0] in (True, None)


def test_as_many_answers_as_references() -> None:
    with pytest.raises(ValueError, match="answers: 1 for 2 references"):
        check_answers(["1", "2"], ["1"])
    assert check_answers([], []) == []


# --- Stuck and crashing samples -----------------------------------------------


def test_a_stuck_sample_costs_itself_only() -> None:
    answers = ["\\lfloor 1+x \\rfloor", "\\lfloor 5x \\rfloor", "x+2", "\\lfloor 1+x \\rfloor", "2"]
    references = ["\\lfloor x+1 \\rfloor", "\\lfloor y \\rfloor", "x+1", "\\lfloor x+1 \\rfloor", "2"]
    assert check_answers(references, answers, timeout=4, compare=sleep_on_five) == [True, None, False, True, True]


def test_many_stuck_samples() -> None:
    answers = [f"\\lfloor {i}x \\rfloor" for i in range(40)]
    verdicts = check_answers(["\\lfloor y \\rfloor"] * 40, answers, timeout=2, compare=sleep_on_five)
    assert verdicts == [None if "5" in answer else True for answer in answers]


def test_crashing_workers() -> None:
    answers = [f"\\lfloor {i}x \\rfloor" for i in range(20)]
    verdicts = check_answers(["\\lfloor y \\rfloor"] * 20, answers, compare=crash_on_five)
    assert verdicts == [None if "5" in answer else True for answer in answers]
    assert check_answers(["\\lfloor x+1 \\rfloor"], ["\\lfloor 1+x \\rfloor"]) == [True]


def test_a_killed_server_is_replaced() -> None:
    assert check_answers(["\\lfloor x+1 \\rfloor"], ["\\lfloor 1+x \\rfloor"]) == [True]
    workers._server.process.kill()
    workers._server.process.wait()
    assert check_answers(["\\lfloor x+1 \\rfloor"], ["\\lfloor 1+x \\rfloor"]) == [True]


# --- Processes and threads ----------------------------------------------------


@pytest.mark.processes
def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import sys
        sys.executable = "/bin/false"
        from hgpo_trl.verification import check_answers
        print(check_answers(["4"], ["4"]), flush=True)
        check_answers(["\\\\lfloor x \\\\rfloor"], ["\\\\lfloor y \\\\rfloor"])
        """,
    )
    assert (done.returncode, done.stdout) == (1, "[True]\n")
    assert "RuntimeError: The process that verifies answers did not start" in done.stderr


def test_from_many_threads() -> None:
    def work(i: int) -> list[bool | None]:
        return check_answers(
            ["\\lfloor x+1 \\rfloor"] * 3,
            [f"\\lfloor 1+x+{i} \\rfloor", "\\lfloor 1+x \\rfloor", f"\\lfloor x+{i} \\rfloor"],
        )

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [[i == 0, True, i == 1] for i in range(8)]


def in_child(connection: Any) -> None:
    connection.send(
        check_answers(
            ["\\lfloor x+1 \\rfloor", "\\lfloor x+1 \\rfloor"], ["\\lfloor 1+x \\rfloor", "\\lfloor x \\rfloor"]
        )
    )


@pytest.mark.processes
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_a_daemonic_child_process(method: str) -> None:
    """Which may not start children by multiprocessing; a forked one inherits the workers' other end."""
    check_answers(["\\lfloor x+1 \\rfloor"], ["\\lfloor 1+x \\rfloor"])
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    child = context.Process(target=in_child, args=(there,), daemon=True)
    child.start()
    assert here.recv() == [True, False]
    child.join()
    assert child.exitcode == 0
    assert check_answers(["\\lfloor x+1 \\rfloor"], ["\\lfloor 1+x \\rfloor"]) == [True]


def run_script(tmp_path: Path, body: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, **kwargs)


@pytest.mark.processes
def test_a_script_without_main_guard(tmp_path: Path) -> None:
    """It is not run again by the workers, and the interpreter ends."""
    done = run_script(
        tmp_path,
        """
        from hgpo_trl.verification import check_answers
        print("started")
        print(check_answers(["\\\\lfloor x+1 \\\\rfloor", "\\\\lfloor x+1 \\\\rfloor"], ["\\\\lfloor 1+x \\\\rfloor",
         "\\\\lfloor x \\\\rfloor"]))
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n[True, False]\n", "")


@pytest.mark.processes
def test_neither_torch_nor_sympy_is_loaded_here(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import sys
        from hgpo_trl.verification import check_answers
        check_answers(["4", "\\\\lfloor x+1 \\\\rfloor"], ["\\boxed{4}", "\\\\lfloor 1+x \\\\rfloor"])
        print({"torch", "sympy", "pebble"} & set(sys.modules))
        """,
    )
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


@pytest.mark.processes
def test_no_process_is_left_behind(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import os, signal
        from hgpo_trl import verification
        from hgpo_trl.verification import workers
        verification.check_answers(["\\\\lfloor x+1 \\\\rfloor"], ["\\\\lfloor 1+x \\\\rfloor"])
        print(workers._server.process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    server = int(done.stdout)
    deadline = time.monotonic() + 600
    while Path(f"/proc/{server}/cmdline").exists() and Path(f"/proc/{server}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- values -------------------------------------------------------------------

x, y = sympy.symbols("x y")
expressions = st.recursive(
    st.integers(0, 30).map(sympy.Integer) | st.sampled_from([x, y, sympy.pi]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] - pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, inner).filter(lambda pair: pair[1] != 0).map(lambda pair: pair[0] / pair[1]),
        inner.map(lambda term: term**2),
        inner.map(sympy.sqrt),
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(expressions)
def test_values_are_sympys(expression: sympy.Expr) -> None:
    """What is evaluated at all is evaluated right, however sympy writes it; whatever is ambiguous is left alone."""
    found = values.value(spelling.normalise(sympy.latex(expression)), values._positive)
    at = {letter: sympy.Rational(values._positive(letter.name)) for letter in (x, y)}
    expected = complex(sympy.N(expression.subs(at)))
    if found is not None and cmath.isfinite(expected) and abs(expected) < 1e12:
        assert abs(found - expected) <= 1e-6 * max(1.0, abs(expected))


def test_most_expressions_are_evaluated() -> None:
    for text in ("\\frac{3x^2+1}{y-2}", "\\sqrt{2}x", "2(x+y)", "\\frac{\\pi}{3}", "3\\sqrt[3]{x}", "4\\cdot 5 - 2",
     "\\sin x", "a_1",
                 "\\log_2 3", "\\cos^2 2x", "5!", "\\binom{5}{2}", "0.\\overline{36}"):  # fmt: skip
        assert values.has_value(spelling.normalise(text)), text
    for text in ("1/2x", "x^12", "(1, 2)", "", "x^{2^{3}", "\\lfloor x \\rfloor", "\\sin^{-1} x"):
        assert not values.has_value(text), text
