"""`hgpo_trl.verification` by kinds of answers: hedges, names, order, huge and tiny numbers, spellings."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgpo_trl.data.example import Example
from hgpo_trl.data.filters import verified_answers
from hgpo_trl.modes import Mode
from hgpo_trl.rewards import accuracy_reward
from hgpo_trl.verification import check_answers, final_answer

Cases = dict[str, list[str]]  # reference -> answers


def wrong_verdicts(cases: Cases, expected: bool) -> list[tuple[str, str, bool | None]]:
    pairs = [(reference, answer) for reference, answers in cases.items() for answer in answers]
    verdicts = check_answers(*zip(*pairs, strict=True))
    return [(*pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not expected]


# --- hedges and denials ---------------------------------------------------------------------------------------------

HEDGES = (
    "{a} or {b}", "{a} and {b}", "{a}, {b}", "{a}; {b}", "{a} {b}", "{a}, {b} or 10", "Either {a} or {b}.",
     "{a}? no, maybe {b} or {a}",
    "between {a} and {b}", "from {a} to {b}", "one of {a}, {b}", "neither {a} nor {b}", "{a} apples or {b} apples",
    "The answer is {a} or {b}.", "The answer is {a} and {b}.", "The answer is {a}, or maybe {b}.",
     "The answer is {a} (or {b}).",
    "The answer is {a}. Or the answer is {b}.", "The answer is {a}. Alternatively, {b}.", "The answer is {a} to {b}.",
    "The answer is {a}, but it could also be {b}.", "The answer is {a}.\n\nIt may also be {b}.",
    "The answer is {a} if x > 0 and {b} otherwise.", "The answer is {a} unless it is {b}.", "The answer is {a}|{b}",
    "The answer is {a}? Or {b}?", "The answer is between {a} and {b}.", "The answer lies in [{a}, {b}].",
     "It is {a}. Maybe {b}.",
    "I think {a}, possibly {b}", "Perhaps {a}, perhaps {b}.", "The answer might be {a} or it might be {b}",
     "Answer: {a} and {b}",
    "Answer: {a}\nor {b}", "Answer: ${a}$ or ${b}$", "The answer is ${a}$, ${b}$", "Possible answers: {a}, {b}",
     "#### {a} or {b}",
    "The answer is not {a} and not {b}", "<answer>{a} or {b}</answer>", "<answer>{a}, {b}</answer>",
     "x = {a} or x = {b}",
    "\\boxed{{{a} or {b}}}", "\\boxed{{{a}, {b}}}", "\\boxed{{{a} \\text{{ or }} {b}}}",
     "\\boxed{{{a} \\text{{ and }} {b}}}",
    "\\boxed{{{a} \\lor {b}}}", "\\boxed{{\\text{{either }} {a} \\text{{ or }} {b}}}", "\\boxed{{\\{{{a}, {b}\\}}}}",
    "\\boxed{{({a}, {b})}}", "\\boxed{{{a} < x < {b}}}", "\\boxed{{x = {a} \\text{{ or }} x = {b}}}",
     "\\boxed{{{a}|{b}}}",
    "$\\boxed{{{a}}}$ or $\\boxed{{{b}}}$", "\\boxed{{{a}}} or maybe \\boxed{{{b}}}", "\\boxed{{{a}}}, \\boxed{{{b}}}",
    "\\boxed{{{a}}} and \\boxed{{{b}}}", "\\boxed{{{a}}}\n\nor\n\n\\boxed{{{b}}}",
     "\\boxed{{{a}}}. Alternatively, \\boxed{{{b}}}",
    "\\boxed{{{a}}} or {b}", "\\boxed{{{a}}} or maybe {b}", "\\boxed{{{a}}} or, if not, {b}",
     "either {a} or \\boxed{{{b}}}",
)  # fmt: skip

number = st.integers(-999, 999).map(str) | st.decimals(0, 99, places=2, allow_nan=False).map("{:f}".format)


@settings(max_examples=12)
@given(st.lists(number, min_size=2, max_size=2, unique_by=Fraction))
def test_two_candidates_are_no_answer(values: list[str]) -> None:
    """Neither of them, in whatever order."""
    assert (
        wrong_verdicts({values[i]: [hedge.format(a=values[0], b=values[1]) for hedge in HEDGES] for i in (0, 1)}, False)
        == []
    )


@settings(max_examples=6)
@given(st.lists(number, min_size=2, max_size=2, unique_by=Fraction))
def test_hedged_words_are_no_answer(values: list[str]) -> None:
    a, b = (f"\\frac{{{abs(round(float(value) * 100))}}}{{7}}" for value in values)
    if a == b:
        return
    hedges = [hedge.format(a=a, b=b) for hedge in HEDGES if not hedge.startswith(("{a}", "{b}"))]
    assert wrong_verdicts({a: hedges, b: hedges}, False) == []


DENIALS = (
    "The answer is not {a}.", "The answer isn't {a}.", "The answer isn’t {a}.", "It cannot be {a}.",
     "The answer can't be {a}", "not {a}",
    "{a} is not the answer.", "{a} is wrong.", "{a} is incorrect", "{a} cannot be the answer.", "Definitely not {a}",
     "Answer: not {a}",
    "The answer is never {a}.", "The answer is anything but {a}", "The answer is other than {a}",
     "All numbers except {a}",
    "It is false that the answer is {a}", "It is not the case that the answer is {a}.", "wrong answer: {a}",
     "The answer is no longer {a}",
    "I doubt the answer is {a}", "It was thought to be {a}, but that is wrong", "x is not equal to {a}",
     "$x \\neq {a}$", "x ≠ {a}",
    "The answer is at least {a}", "The answer is more than {a}.", "The answer is less than {a}",
     "The answer is {a} or more", "at most {a}",
    "We can rule out {a}.", "{a} does not work.", "{a} fails", "Any number but {a}", "It isn't true that it's {a}",
    "is it {a}?",
    "\\boxed{{{a}}} does not work", "\\boxed{{{a}}}\\pm 1", "The answer is {a}. Just kidding, it's 1234.",
    "{a} is excluded.",
    "{a}? no, 1234", "{a}, no wait, 1234", "{a}... actually 1234", "The answer is {a}. No, it is 1234.",
     "<answer>not {a}</answer>",
    "The answer is not \\boxed{{{a}}}.", "It isn't $\\boxed{{{a}}}$", "cannot be \\boxed{{{a}}}",
     "\\boxed{{{a}}} is not the answer",
    "\\boxed{{{a}}} is wrong", "\\boxed{{\\neq {a}}}", "\\boxed{{\\text{{not }} {a}}}", "\\boxed{{not {a}}}",
     "\\boxed{{\\ge {a}}}",
    "\\boxed{{x > {a}}}", "\\boxed{{{a} \\text{{ or more}}}}", "\\boxed{{{a}?}}",
     "It is not true that the answer is \\boxed{{{a}}}",
)  # fmt: skip


@settings(max_examples=10)
@given(number.filter(lambda text: Fraction(text) != 1234))
def test_a_denied_candidate_is_no_answer(value: str) -> None:
    assert wrong_verdicts({value: [denial.format(a=value) for denial in DENIALS]}, False) == []


@settings(max_examples=10)
@given(st.sampled_from(["Navin", "Paris", "even", "East"]), st.sampled_from(["Bob", "Rome", "odd", "West"]))
def test_hedged_words(a: str, b: str) -> None:
    hedges = ("{a} or {b}", "The winner is {a} or {b}.", "either {a} or {b}", "\\boxed{{\\text{{{a} or {b}}}}}",
     "The answer is {a} or {b}",
              "The winner is not {a}.", "not {a}", "\\boxed{{\\text{{not {a}}}}}", "{a}, {b}",
               "The answer is not {a}")  # fmt: skip
    assert wrong_verdicts({a: [hedge.format(a=a, b=b) for hedge in hedges]}, False) == []
    plain = (
        "The winner is {a}.",
        "{a}.",
        "**{a}**",
        "Answer: {a}",
        "\\boxed{{\\text{{{a}}}}}",
        "<answer>{a}</answer>",
        "The answer is {a}.",
    )
    assert wrong_verdicts({f"\\text{{{a}}}": [form.format(a=a) for form in plain]}, True) == []


def test_one_candidate_is_an_answer() -> None:
    """Whatever words and other numbers stand around it."""
    answers = [
        "The answer is 8, not 9.", "It's not 9, it's 8.", "The answer is 8 because 4+4=8.",
         "The answer is 8.\n\nI hope it is correct.",
        "The answer must be 8.", "So there are 8 ways to do it.", "She needs 8 more apples.", "Answer: 8 apples",
         "**8**", "Thus $x = 8$.",
        "There are 5 red and 3 blue balls. So 5 + 3 = 8 balls.", "In total, Tom has $5 + $3 = $8.",
         "The answer is $8$ dollars.",
        "We have 2 cases. The answer is 8.", "So n is 8, and the answer is 8.", "x = 8, which is not 9",
         "Final Answer: $\\boxed{8}$",
        "This is not hard: the answer is \\boxed{8}.", "Since 3 does not divide n, we get $n = \\boxed{8}$.",
         "The answer is\n8",
        "The answer is:\n\n$$\n8\n$$", "It takes her 8 hours to drive 300 miles.",
         "The remainder is 8 when divided by 11.", "答案是8。",
        "答案：8", "La respuesta es 8.", "She is 8 years old.", "Answer: 8 km/h", "ANSWER: 8", "The answer is 8!",
         "8 USD", "€8", "'8'",
        "Note that 9 is wrong. The answer is 8.", "First \\boxed{9}. Wait, that is wrong: \\boxed{8}",
         "No, \\boxed{8}",
        "\\begin{align*}\n2x &= 16 \\\\\nx &= 8.\n\\end{align*}",
        "5 options and 3 more, for a total of $5+3=8$ outfits.",
        "\\[2x = 16.\\]Therefore, $x = 8.$", "Since $2^x=2^8$, which implies $x=8$.",
        "He can have at most $\\boxed{8}$ left.",
        "So $AB=\\frac{16}{2}$, or $\\boxed{8}$.", "so $2x = 16$, or $x = \\boxed{8}$.",
        "leaving an answer of $12-4=8$.",
    ]  # fmt: skip
    assert wrong_verdicts({"8": answers}, True) == []


# --- names and order ------------------------------------------------------------------------------------------------

NAMES = (
    ("x", "y", "z"),
    ("A", "B", "C"),
    ("p", "q", "r"),
    ("a_1", "a_2", "b"),
    ("\\alpha", "\\beta", "\\gamma"),
    ("m", "n", "k"),
)


@settings(max_examples=20)
@given(st.sampled_from(NAMES), st.lists(st.integers(-50, 50).map(str), min_size=2, max_size=3, unique=True))
def test_named_unknowns_keep_their_names(names: tuple[str, ...], values: list[str]) -> None:
    pairs = list(zip(names, values, strict=False))

    def text(pairs: list[tuple[str, str]], joint: str = ", ") -> str:
        return joint.join(f"{name}={value}" for name, value in pairs)

    reference = text(pairs)
    for order in itertools.permutations(pairs):
        listed = list(order)
        assert (
            wrong_verdicts(
                {reference: [f"\\boxed{{{text(listed)}}}", text(listed, " and "), f"So ${text(listed)}$."]}, True
            )
            == []
        )
    for order in itertools.permutations(values):
        swapped = text(list(zip(names, order, strict=False)))
        if list(order) != values:
            assert wrong_verdicts({reference: [f"\\boxed{{{swapped}}}", swapped.replace(", ", " and ")]}, False) == []
            assert (
                wrong_verdicts(
                    {reference: [f"\\boxed{{{', '.join(order)}}}", f"\\boxed{{({', '.join(order)})}}"]}, False
                )
                == []
            )
    others = text(list(zip(("u", "v", "w"), values, strict=False)))
    assert wrong_verdicts({reference: [others, text(pairs[:-1])]}, False) == []
    tupled = f"({', '.join(names[: len(values)])})=({', '.join(values)})"
    assert wrong_verdicts({reference: [tupled], tupled: [reference, f"({', '.join(values)})"]}, True) == []


ORDERED: dict[str, tuple[list[str], list[str]]] = {  # reference: right answers, wrong ones
    "\\{1,2\\}": (["\\{2,1\\}", "2,1", "1 \\text{ and } 2"], ["(2,1)", "(1,2)", "[1,2]", "\\{1,3\\}", "\\{1\\}", "1"]),
    "(2,1)": (["(2, 1)", "x=2, y=1"], ["(1,2)", "\\{2,1\\}", "[2,1]", "(2,1,1)"]),
    "2, 3": (["x=3 \\text{ or } x=2", "x=2,3", "\\{3,2\\}", "x_1=2, x_2=3", "3 and 2"], ["2", "2, 4", "2, 3, 4",
     "2, 2", "x=2"]),
    "1,2,\\dots,10": (["1, 2, \\ldots, 10", "1,2,\\cdots,10", "1,2,...,10"], ["1,2,\\dots,9", "2,1,\\dots,10",
     "1,2,10", "1,3,\\dots,10"]),
    "\\{0,1,2,\\ldots\\}": (["\\{0, 1, 2, \\dots\\}"], ["\\{1,2,\\ldots\\}"]),
    "1+2+\\dots+10": (["1 + 2 + \\cdots + 10"], ["1+2+\\dots+9"]),
    "2\\mathbf{i}+3\\mathbf{j}": (["3\\mathbf{j}+2\\mathbf{i}", "2i+3j"], ["2\\mathbf{i}-3\\mathbf{j}",
     "3\\mathbf{i}+2\\mathbf{j}"]),
    "\\vec{a}-2\\vec{b}": (["-2\\vec{b}+\\vec{a}"], ["2\\vec{b}-\\vec{a}", "\\vec{a}+2\\vec{b}"]),
    "2\\hat{i}+3\\hat{j}": (["2\\hat{i}+3\\hat{j}"], ["2\\hat{i}-3\\hat{j}"]),
    "\\begin{pmatrix}1\\\\ 2\\end{pmatrix}": (["\\begin{bmatrix}1\\\\2\\end{bmatrix}"],
     ["\\begin{pmatrix}2\\\\1\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"]),
    "1:2": (["1 : 2", "2:4"], ["2:1", "1:3"]),
    "4:15": (["4:15", "04:15", "4 : 15"], ["8:30", "12:45", "4:51"]),
    "1:05:30": (["01:05:30"], ["2:10:59", "1:05"]),
    "f(1)=2, f(2)=4": (["f(2)=4, f(1)=2"], ["f(1)=4, f(2)=2"]),
    "mean=3, median=5": (["median=5, mean=3"], ["mean=5, median=3"]),
    "x=1 \\text{ or } x=-2": (["1, -2", "-2, 1", "x=-2 \\text{ or } x=1"], ["x=1", "1", "2, -1"]),
    "1, 1, 2": (["2, 1, 1"], ["1, 2, 2", "1, 2"]),
    "x=5": (["5", "5=x", "x = 5"], ["y=5", "x=-5", "5x"]),
}  # fmt: skip


@pytest.mark.parametrize("reference", ORDERED)
def test_order_where_it_counts(reference: str) -> None:
    right, wrong = ORDERED[reference]
    assert (
        wrong_verdicts({reference: [form.format(answer) for answer in right for form in ("{}", "\\boxed{{{}}}")]}, True)
        == []
    )
    assert (
        wrong_verdicts(
            {reference: [form.format(answer) for answer in wrong for form in ("{}", "\\boxed{{{}}}")]}, False
        )
        == []
    )


# --- huge and tiny numbers --------------------------------------------------------------------------------------------

SIZES = [  # reference, another value, the same value
    ("2^{2018}", "2^{2017}", "4^{1009}"),
    ("2^{2018}", "2^{2018}-1", "2^{2017}+2^{2017}"),
    ("2018!", "2017!", "2018 \\cdot 2017!"),
    ("10^{400}", "10^{401}", "100^{200}"),
    ("-10^{400}", "10^{400}", "-100^{200}"),
    ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}", "2^{-99}"),
    ("6.63 \\times 10^{-34}", "6.62 \\times 10^{-34}", "0.663 \\times 10^{-33}"),
    ("6.02e23", "6.03e23", "6.02 \\times 10^{23}"),
    ("5 \\times 10^{-324}", "6 \\times 10^{-324}", "50 \\times 10^{-325}"),
    ("0.000000000000000000001", "0.000000000000000000002", "10^{-21}"),
    ("1-2^{-2018}", "1-2^{-2017}", "\\frac{2^{2018}-1}{2^{2018}}"),
    ("\\frac{10^{400}+1}{3}", "\\frac{10^{400}-1}{3}", "\\frac{1+10^{400}}{3}"),
    ("2^{1000000}", "2^{1000001}", "4^{500000}"),
    ("3^{10^{10}}", "3^{10^{10}+1}", "9^{5 \\cdot 10^{9}}"),
    ("9^{9^{9^9}}", "9^{9^{9}}", "9^{9^{9^{9}}}"),
    ("10^{10^{10}}", "10^{10^{11}}", "10^{10^{10}}"),
    ("(10^{20})!", "(10^{21})!", "(10^{20})!"),
    ("\\binom{2000}{1000}", "\\binom{2000}{999}", "\\frac{2000!}{1000!1000!}"),
    ("\\pi \\cdot 10^{400}", "\\pi \\cdot 10^{401}", "10^{399}\\cdot 10\\pi"),
    ("2^{100}\\sqrt{3}", "2^{101}\\sqrt{3}", "4^{50}\\sqrt{3}"),
    ("1+10^{-30}\\pi", "1+10^{-31}\\pi", "1+\\frac{\\pi}{10^{30}}"),
    ("e^{1000}", "e^{1001}", "e^{500}e^{500}"),
    ("\\ln(2^{2018})", "\\ln(2^{2017})", "2018\\ln 2"),
    ("2^{2018}x", "2^{2017}x", "4^{1009}x"),
    ("x^{2018}", "x^{2017}", "x^{2000}x^{18}"),
]


@pytest.mark.parametrize(("reference", "other", "same"), SIZES)
def test_sizes_beyond_floating_point(reference: str, other: str, same: str) -> None:
    """Towers that nobody can compute among them: to try would take for ever."""
    assert check_answers([reference] * 2, [same, f"\\boxed{{{same}}}"]) == [True] * 2
    assert check_answers([reference, other, same], [f"\\boxed{{{other}}}", reference, other]) == [False] * 3


integers = st.integers(1, 10**6)
exponents = st.integers(0, 2000)


@settings(max_examples=20)
@given(
    integers,
    exponents,
    integers,
    exponents,
    st.integers(-2, 2),
    st.sampled_from(["{}", "\\frac{{1}}{{{}}}", "\\sqrt{{{}}}", "-{}"]),
)
def test_numbers_are_equal_or_not(a: int, m: int, b: int, n: int, offset: int, form: str) -> None:
    """Never undecided, and the same both ways."""
    x, y = f"({a}^{{{m}}}+{offset})", f"({b}^{{{n}}})"
    left, right = form.format(x), form.format(y)
    if a**m + offset <= 0:
        return
    assert check_answers([left, right], [right, left]) == [a**m + offset == b**n] * 2
    assert check_answers([left], [form.format(f"({offset}+{a}^{{{m}}})")]) == [True]


@settings(max_examples=20)
@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_spellings_of_a_number(value: int, bottom: int) -> None:
    thousands = f"{value:,}"
    forms = [
        str(value),
        thousands,
        thousands.replace(",", "{,}"),
        thousands.replace(",", "\\,"),
        thousands.replace(",", "\\;"),
        f"{value}.0",
    ]
    forms += [
        f"{value} apples",
        f"${value}",
        f"\\text{{{value}}}",
        f"\\mathbf{{{value}}}",
        f"`{value}`",
        f"<answer>{value}</answer>",
        f"({value})",
    ]
    forms += [
        f"The answer is {value}.",
        f"\\boxed {{{value}}}",
        f"\\boxed{{x = {value}}}",
        f"**{thousands}**",
        f"#### {thousands}",
    ]
    assert wrong_verdicts({str(value): forms}, True) == []
    assert wrong_verdicts({str(value + bottom): forms}, False) == []
    whole, top = divmod(value, bottom)
    reference = f"\\frac{{{value}}}{{{bottom}}}"
    if top > 0 and whole:
        assert (
            wrong_verdicts(
                {
                    reference: [
                        f"{whole} {top}/{bottom}",
                        f"{whole}\\frac{{{top}}}{{{bottom}}}",
                        f"\\boxed{{{value}/{bottom}}}",
                    ]
                },
                True,
            )
            == []
        )
        assert (
            wrong_verdicts(
                {str(whole): [f"{whole} {top}/{bottom}"], f"\\frac{{{top}}}{{{bottom}}}": [f"{whole} {top}/{bottom}"]},
                False,
            )
            == []
        )


# --- spellings ------------------------------------------------------------------------------------------------------

SPELLINGS: dict[str, tuple[list[str], list[str]]] = {  # reference: right answers, wrong ones
    "C": (
        ["C) 12", "(C) 12", "C. mitochondria", "option C", "Option C is correct.", "The answer is option (C).",
         "\\textbf{(C)}", "C is correct",
         "\\boxed{\\text{(C) }12}", "The answer is C) 12", "**C**"],
        ["D) 12", "C or D", "option C or D", "A, B, C", "not C", "The answer is not C", "C/D",
         "Option C or option D", "A) 1 B) 2 C) 3",
         "Option B is correct, not C.", "\\boxed{C \\text{ or } D}"],
    ),
    "12": (["C) 12", "(C) 12"], ["12) C", "C) 13"]),
    "\\frac{5}{4}": (["1 1/4", "1¼", "1.25", "1\\tfrac14", "{5 \\over 4}", "The answer is 1 1/4."], ["1/4", "1",
     "11/4"]),
    "\\frac{1}{2}": (["½", "50\\%", "\\frac12", ".5"], ["⅓", "5\\%", "50"]),
    "10 - 2\\sqrt{5}": (["10 - 2√5", "10-2√(5)", "10-\\sqrt{20}", "10 - 2*sqrt(5)", "The answer is 10 - 2√5."],
     ["10 + 2√5", "10", "8√5"]),
    "(-\\infty,3)": (["x<3", "3 > x", "x \\in (-\\infty, 3)"], ["x \\le 3", "x>3", "(3,\\infty)", "x<4",
     "(-\\infty,3]"]),
    "[2,5)": (["2 \\le x < 5", "5 > x \\ge 2"], ["2 < x < 5", "2 \\le x \\le 5", "[2,5]"]),
    "x \\ge 2": (["[2,\\infty)", "2 \\le x", "[2,+\\infty)", "x \\geqslant 2"], ["(2,\\infty)", "x > 2", "x \\le 2",
     "2"]),
    "(-\\infty,2)\\cup(5,\\infty)": (["x<2 \\text{ or } x>5", "(5,\\infty) \\cup (-\\infty,2)"], ["x<2",
     "x \\le 2 \\text{ or } x>5"]),
    "\\mathrm{e}^2": (["e^2", "\\exp(2)"], ["e^3", "2\\mathrm{e}", "\\mathrm{e}^{-2}"]),
    "1+\\frac{1}{\\mathrm{e}}": (["1+1/e", "1+e^{-1}"], ["1-1/\\mathrm{e}", "1-\\frac{1}{e}"]),
    "\\emptyset": (["\\varnothing", "∅", "\\{\\}"], ["\\{0\\}", "0", "\\{\\emptyset\\}"]),
    "3 \\pmod 7": (["3 \\pmod{7}", "3", "3 (mod 7)", "x \\equiv 3 \\bmod 7", "10 \\pmod 7"], ["3 \\pmod 8",
     "4 \\pmod 7", "4"]),
    "28\\%": (["28 percent", "28 per cent", "28 \\text{ percent}", "The answer is 28 percent.", "0.28"],
     ["27 percent", "280\\%", "0.028"]),
    "\\sqrt{2}": (["√2", "2^{1/2}", "1.41421356", "\\frac{2}{\\sqrt2}"], ["1.41", "1.4142", "-\\sqrt{2}", "2"]),
    "\\frac{1}{3}": (["0.333333333", "0.\\overline{3}", "0.\\bar{3}"], ["0.33", "0.3333", "3"]),
    "12\\pi": (["12\\pi \\approx 37.70", "12π"], ["37.7", "12", "\\approx 37.7"]),
    "\\log_2 3": (["\\frac{\\ln 3}{\\ln 2}"], ["\\log_3 2", "\\ln 3"]),
    "e^{i\\pi/3}": (["\\frac12+\\frac{\\sqrt3}{2}i"], ["\\frac12-\\frac{\\sqrt3}{2}i"]),
    "|x|": (["|x|", "|-x|"], ["x", "-x"]),
    "(-1)^n": (["(-1)^{n+2}", "(-1)^n"], ["1", "-1", "(-1)^{n+1}"]),
    "E": (["\\mathrm{E}"], ["E'", "\\mathrm{E}*2", "F"]),
    "\\text{on}": (["on"], ["no", "\\text{no}"]),
    "listen": (["Listen"], ["silent", "listens"]),
    "Yes": (["Yes, it is.", "yes", "The answer is yes."], ["No, it isn't.", "Yes or no", "Yes and no", "not yes",
     "Yes, no"]),
}  # fmt: skip


@pytest.mark.parametrize("reference", SPELLINGS)
def test_spellings(reference: str) -> None:
    right, wrong = SPELLINGS[reference]
    assert wrong_verdicts({reference: right}, True) == []
    assert wrong_verdicts({reference: wrong}, False) == []


# --- worked solutions -------------------------------------------------------------------------------------------------

WORKED = "She packs 3 + 4 = <<3+4=7>>7 boxes.\nShe sells {x} of them.\n#### {x}"


@settings(max_examples=10)
@given(st.integers(-(10**6), 10**6), st.booleans())
def test_the_reference_of_a_worked_solution(value: int, comma: bool) -> None:
    """What follows `####` is the reference in training, evaluation and the builder."""
    reference = WORKED.format(x=f"{value:,}" if comma else value)
    assert final_answer(reference) == (f"{value:,}" if comma else str(value))
    answers = [str(value), f"The answer is {value}.", str(value + 1), "\\boxed{7.5}"]
    expected = [True, True, False, False]
    assert check_answers([reference] * 4, answers) == expected
    completions = [f"<no_think>\n{answer}\n</no_think>" for answer in answers]
    assert accuracy_reward(completions, answer=[reference] * 4) == [float(right) for right in expected]
    prompt = [{"role": "user", "content": "How many does she sell?"}]
    examples = [Example(prompt, "", "maths", answer, Mode.NO_THINK, "", answer, reference) for answer in answers]
    assert [drop is None for drop in verified_answers()(examples)] == expected


def test_a_long_worked_solution() -> None:
    assert check_answers([f"{'Then she counts. ' * 1000}\n#### 18"] * 2, ["18", "19"]) == [True, False]


# --- the user's cases -------------------------------------------------------------------------------------------------

DIFFER: dict[tuple[str, str], str] = {}  # reference and answer: why the verdict is another one


def test_reported_answers() -> None:
    path = Path(__file__).parents[2] / "shared" / "cases" / "answers.json"
    if not path.exists():
        pytest.skip("no reported answers: ../shared/cases is missing")
    cases = json.loads(path.read_text(encoding="utf-8"))
    references, answers = ([case[key] for case in cases] for key in ("reference", "answer"))
    verdicts = check_answers(references, answers, timeout=60)  # a busy machine changes no verdict
    judged = zip(cases, verdicts, strict=True)
    differ = {(case["reference"], case["answer"]) for case, verdict in judged if verdict is not case["equal"]}
    assert differ == DIFFER.keys()
