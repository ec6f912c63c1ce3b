r"""The answer checker against hostile answers: a torture table, and a seeded fuzz of its grammar.

Every call is held to CPU_SECONDS and MEGABYTES, twice what README promises: the promise is measured on a quiet machine
(tests/bench/answer_checker.py --fuzz), and CPU seconds double on a busy one.
"""
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from redi import answer_checker
from redi.answer_checker import answers_match, engine, explain, extract_answer, is_correct

CPU_SECONDS, MEGABYTES = 1.0, 200


def megabytes():
    """The largest size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def cost(call, *args):
    """(result, CPU seconds, growth of the largest size in megabytes)."""
    size, start = megabytes(), time.process_time()
    result = call(*args)
    return result, time.process_time() - start, megabytes() - size


# A grammar of answers: what it makes is nearly always readable, so that all rules meet all others.

ATOMS = r"""
    0 1 2 3 5 7 10 12 100 0.5 2.75 .4 1,234 10^6 1e5 2e-3 -3 x y n k a_1 x_{n+1} \alpha \pi e i \theta \infty
    \sqrt{2} \frac12 \frac{1}{3} 0.\overline{6} 3\frac{1}{7} 12345678901234567890 101_2 2A_{16} 30^\circ 45° 20\%
    f(x) f(2) AB \hat{x} (C) \text{(B)} \emptyset \mathbb{R} \varnothing""".split()
UNARY = r"""
    -# (#) \left(#\right) \sqrt{#} \sqrt[3]{#} #^2 #^{-1} (#)^{1/2} (#)! |#| \lfloor#\rfloor \lceil#\rceil \sin(#)
    \cos^2(#) \tan{#} \arcsin(#) \tan^{-1}(#) \ln(#) \log_2(#) \log(#) e^{#} 2^{#} (-1)^{#} \frac{1}{#} {#} \exp(#)
    \sec(#) \sinh(#) \arctan\frac{#}{2} \operatorname{lcm}(#,6) #° #\% \overline{#} #' \text{Answer:}#
    \text{the~value~is}# #\text{cm} #\text{m}^2 #_{10} #\text{~for~all~}x""".split()
BINARY = r"""
    #+# #-# #*# #/# ## #\cdot# \frac{#}{#} #^{#} (#)^{(#)} (#)(#) \binom{#}{#} \log_{#}{#} \max(#,#) \sqrt[#]{#}
    #\pm# #\mp# #:# g(#,#) #\times# #!/#""".split()
OUTER = r"""
    # x=# #=# #,# #,#,# \{#,#\} (#,#) (#,#),(#,#) [#,#] (#,#] #\cup# (#,#)\cup[#,#) [#,#]\cap(#,#)
    (#,#)\setminus\{#\} x<# x\geq# #<x\leq# x\in[#,#] \{x|x>#\} \{x\in\mathbb{R}:#<x<#\} x<#\text{or}x>#
    \begin{pmatrix}#&#\\#&#\end{pmatrix} \begin{cases}#&x>0\\#&x<0\end{cases} f(x)=# y=#x+# #x+#y=# #\text{and}# #;#
    \pm# x\neq# #\approx# x_1=#,x_2=# #\equiv# |x-#|<# a_n=# #:#:# \text{(A)}# \langle#,#\rangle #\le#\le#""".split()


def expression(rng, depth):
    if depth <= 0 or rng.random() < 0.25:
        return rng.choice(ATOMS)
    text = rng.choice(UNARY if rng.random() < 0.45 else BINARY)
    while "#" in text:
        text = text.replace("#", expression(rng, depth - 1), 1)
    return text


def from_grammar(rng):
    text = rng.choice(OUTER) if rng.random() < 0.6 else "#"
    depth = rng.choice([0, 1, 1, 2, 2, 3, 4, 6])
    while "#" in text:
        text = text.replace("#", expression(rng, depth), 1)
    return text


PIECES = r"""
    \frac \frac{ \sqrt \sqrt[ { } ( ) [ ] \{ \} | || ^ ^{ _ _{ + - * / = < > \le \ge \ne , ; : . ! !! % $ ' ^\circ
    \pm \mp \cup \cap \setminus \in \infty \pi e i x y n f( g(x) \sin \cos^2 \log_ \ln \log \arcsin \tan^{-1} \binom
    \lfloor \rfloor \left( \right) \left| \right| \text{ \text{and} \text{cm} and or \mathrm{ \mathbb{R} \cdot 1 2 10
    0.5 \begin{pmatrix} \end{pmatrix} \begin{cases} \end{cases} & \\ 1e5 1e-9 1,000 12345678901234567890 9^9 10^{10}
    (-1)^ \overline{ \vec{ \boxed{ \boxed \sum \int ½ ² ₃ √ π ∞ ≤ ② α " ` ~ # \x \ \forall where if 5th million pm
    \pmod{ \equiv \approx \langle \rangle ⁻ ＋ é 字 ٣ __import__('os') \write18{ 1//0 no \text{not} percent (C) "cm
    \choice ° # \exp \var \varphi 'x _' \0""".split()


def random_answer(rng, answers):
    """From the grammar, from pieces, from characters, or a mutation of an answer."""
    sort = rng.random()
    if sort < 0.45:
        return from_grammar(rng)
    if sort < 0.6:
        count = rng.randint(1, rng.choice([4, 12, 60]))
        return "".join(rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(count))
    if sort < 0.65:
        return rng.choice(PIECES + ATOMS + answers) * rng.randint(1, 400)
    if sort < 0.7:
        top = rng.choice([127, 0x2FFF, 0x10FFFF])
        return "".join(chr(rng.randint(0, top)) for _ in range(rng.randint(1, 60)))
    if sort < 0.73:
        count = rng.randint(1, 30)
        return rng.choice(PIECES) * count + "1" + rng.choice(PIECES) * count
    text = rng.choice(answers) if rng.random() < 0.5 else from_grammar(rng)
    for _ in range(rng.randint(1, 4)):
        i = rng.randint(0, len(text))
        j, other = min(len(text), i + rng.randint(0, 6)), rng.choice(answers)
        change = rng.choice(["", rng.choice(PIECES), rng.choice(ATOMS), other, text[i:j] * rng.randint(2, 60)])
        text = text[:i] + change + text[j:]
    return text


ANSWERS = [
    r"\frac{3}{2}", r"(-\infty, 0) \cup [1, 2)", r"3 \pm 2\sqrt{2}", r"x \in [-2,7]", "y = 2x+3", "10,080",
    "5:8", r"12\text{ cm}^2", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\{1, 2\}", "(1,2),(3,4)",
    r"2 < x \le 4", r"\binom{2n}{n}", r"\lfloor \frac{n}{2} \rfloor", "f(x) = x^2 + 1", r"\text{(C)}",
    "4:30 pm", r"e^{2it}"]


def random_pairs(seed, count, answers):
    """Pairs of answers: two random ones, a random and a real one, twice the same, or one and a change of it."""
    rng = random.Random(seed)
    for _ in range(count):
        text = random_answer(rng, answers)
        other = rng.choice([rng.choice(answers), random_answer(rng, answers), text, " %s " % text, "(%s)+0" % text,
                            "1*%s" % text, text.replace("1", "2"), text[::-1]])
        yield text, other


def check(pairs):
    """The verdicts of pairs: nothing raised, each call within its bounds, symmetric, and the same in a thread."""
    engine()  # its import is no part of a call
    verdicts = []
    for text, other in pairs:
        verdict, seconds, size = cost(answers_match, text, other)
        assert seconds < CPU_SECONDS and size < MEGABYTES, (text, other, seconds, size)
        assert answers_match(other, text) == verdict, (text, other)
        if len(verdicts) % 8 == 0:
            assert ("\nequal:" in explain(text, other)) == verdict, (text, other)
            is_correct(text, [other])
        verdicts.append(verdict)
    in_thread = []
    thread = threading.Thread(target=lambda: in_thread.extend(answers_match(*pair) for pair in reversed(pairs)))
    thread.start()
    thread.join()
    assert in_thread[::-1] == verdicts
    return verdicts


def nest(form, core, count):
    for _ in range(count):
        core = form.replace("#", core)
    return core


RADICALS = r"\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}"  # zero, and sympy's is_zero needs seconds to find out
TINY = r"\sqrt{10^{200}+1}-10^{100}"  # 5e-101, and it cancels in 100 digits
POINTS = "(a+b+c+d+e)^{60}"

# where the row comes from, a prediction, a gold answer, the verdict (None: either will do, but within the bounds)
TORTURE = [
    # facts, section F: is_zero of radicals that cancel needs minutes, and Mul, Abs and comparisons ask for it
    ("is_zero", RADICALS, "0", True),
    ("is_zero", RADICALS + "+" + RADICALS.replace("2}", "7}").replace("5+", "10+").replace("6}}", "21}}"), "0", True),
    ("is_zero", "0*(%s)" % RADICALS, "0", True),
    ("is_zero", "|%s|" % RADICALS, "0", True),
    ("is_zero", "x > %s" % RADICALS, "x > 0", True),
    ("is_zero", r"\max(%s, 1)" % RADICALS, "1", None),
    # a zero in disguise in every position of the grammar where sympy or mpmath would divide, compare or look for a sign
    *[("disguised zero", form.replace("#", RADICALS), gold, verdict) for form, gold, verdict in [
        (r"\frac{1}{#}", "1", False), (r"\frac{1}{#}", r"\frac{1}{0}", False),
        ("1/(#)^2", "1", False),
        ("(#)^{-1}", "1", False), ("(#)^0", "1", None), ("0^{#}", "1", None), ("2^{#}", "1", None),
        (r"\ln(#)", "0", False), (r"\log_{#} 2", "1", False), (r"\log_2(#)", "0", False), (r"\sqrt[#]{2}", "1", False),
        (r"\tan(\frac{\pi}{2}+#)", "1", False), (r"\sec(\frac{\pi}{2}+#)", "1", False), (r"\cot(#)", "1", False),
        (r"\arcsin(1+#)", r"\frac{\pi}{2}", None), (r"\lfloor#\rfloor", "0", True), (r"\lceil#\rceil", "0", True),
        ("(#)!", "1", None), (r"\binom{3}{#}", "1", None), ("(0, #]", "(0, 0]", None), ("[#, 1)", "[0, 1)", True),
        (r"(-\infty, #)", "x < 0", True), (r"\{#, 0\}", r"\{0\}", None), ("(#, 1)", "(0, 1)", True),
        ("#:1", "0:1", None),
        ("(#)x = 1", "x = 1", False), ("(#)x < 1", "x < 1", False), ("y = (#)x", "y = 0", None), ("1, #", "0, 1", True),
        (r"\begin{pmatrix}#\\1\end{pmatrix}", "(0, 1)", True), ("f(#)", "f(0)", None), ("5 = #", "5", False)]],
    # false equalities of the study: points that repeat, a relative tolerance on both sides, terms lost in rounding
    ("false zero", TINY, "0", False), ("false zero", r"\frac{1}{%s}" % TINY, "0", False),
    ("false zero", "10^{-50}", "0", False), ("false zero", r"e^{-300}", "0", False),
    ("false zero", "2^{1009}+1", "2^{1009}", False), ("false zero", r"\pi+10^{-90}", r"\pi", False),
    ("false zero", POINTS + "+a", POINTS, False), ("false zero", POINTS, POINTS + r"+10^{-40}", False),
    ("false zero", "x!!!!!!!", "x", False), ("false zero", r"\sin(x)^{300}", "0", False),
    ("false zero", r"\cos(\sin(\cos(\sin(x))))", r"\cos(\sin(\cos(\sin(x+10^{-30}))))", False),
    ("false zero", r"\tanh(1000)", "1", False), ("false zero", r"x^{200}", r"x^{200}+x^{-200}", False),
    ("false zero", r"2^{2^{-500}}", "1", False), ("false zero", r"\sqrt[1000]{1+10^{-100}}", "1", False),
    # facts, section F: an exponential tower hangs evalf, and a root of a large number hangs Integer**Rational
    *[("tower", text, "1", False) for text in (
        "9^{9^{9^{9^9}}}", r"\sin(2^{2000000})", "2^{2^{2^{2^{2^{2}}}}}", r"e^{e^{e^{e^{e}}}}", r"\ln(9^{9^9})",
        "(9^{9^9})^{-1}", "(9^{999999999})^{1/999999999}", r"\sqrt[999999999]{9^{1000}}", r"\frac{1}{9^{9^9}}",
        "x^{x^{x^{x^{x^{x}}}}}", "i^{i^{i^{i}}}", "((2^{999})^{999})^{999}", "(%s)^{1/2}" % ("7" * 900),
        "(%s)^{3/7}" % ("7" * 900), "7^{%s}" % ("7" * 900), "(1+x)^{1000000}", "(x+y+z)^{1000}", "1e308^{1e308}",
        r"\exp(\exp(\exp(\exp(10))))", r"(-1)^{%s}" % ("9" * 400), r"\sinh(\sinh(\sinh(9)))", r"10^{-10^{10}}")],
    ("tower", "2^{2^{2^{2}}}", "65536", True), ("tower", "(2^{500})^2", "2^{1000}", True),
    # facts, section F: binomial(10**9, 10**5) needs 16 s; factorials of factorials are the same by other means
    *[("huge binomial", text, "1", False) for text in (
        r"\binom{10^9}{10^5}", r"\binom{1000000}{500000}", r"\binom{3000}{1500}", "3000!", "1000000!", "((9!)!)!",
        "10!!!!!!", "x" + "!" * 400, r"\binom{\binom{20}{10}}{\binom{20}{9}}", r"\frac{2999!}{2998!}",
        r"\binom{10^{900}}{2}", r"\binom{-5}{3}", r"\binom{\frac12}{%s}" % ("9" * 50), "(10^{900})!", "0.5!", "(-1)!")],
    ("huge binomial", r"\binom{60}{30}", "118264581564861424", True),
    # sums of fractions: each term pays for the common denominator, and 22 powers of 40,000 bits took 6 s until charged
    *[("long fraction", form, "1", False) for form in (
        "+".join("%d^{-%d}" % (n, 39_000 // n.bit_length()) for n in range(3, 47, 2)),
        "+".join("%d^{-%d}" % (n, 4000 // n.bit_length()) for n in range(3, 9, 2)) + "+.1" * 300,
        "+".join(r"%d^{-%d}\pi" % (n, 1900 // n.bit_length()) for n in range(3, 23, 2)) + "+.1" * 300,
        "+".join(r"\frac{1}{%d!}" % n for n in range(2500, 2540)),
        ",".join("%d^{-%d}e" % (n, 9000 // n.bit_length()) for n in range(3, 43, 2)),
        nest(r"\frac{1}{3^{-900}+#}", "1", 20), nest("(7^{-900}+#)", "1", 20), nest("(7^{900}+1)(#)", "1", 20))],
    # facts, section F: a Union of 200 intervals needs 8 s; and so would lists whose members are compared pair by pair
    ("union", r"\cup".join("[%d,%d.5]" % (n, n) for n in range(130)),
     r"\cup".join("[%d,%d.5]" % (n, n) for n in reversed(range(130))), None),
    ("union", r"\cup".join("[%d,%d]" % (n, n + 1) for n in range(20)), "[0,20]", True),
    ("union", r"\cup".join(r"(\sqrt{%d},\sqrt{%d})" % (n, n + 1) for n in range(60)), r"(0,1)", False),
    ("union", r"\setminus".join(["[0,9]"] * 100), r"\emptyset", None),
    ("union", r"\text{ or }".join("%d<x<%d.5" % (n, n) for n in range(80)), "0<x<1", False),
    ("union", "<".join("x" * 150), "x<1", None), ("union", "|" * 150 + "x" + "|" * 150 + "<1", "x<1", None),
    ("long list", ",".join("%d" % n for n in range(390)), ",".join("%d" % n for n in reversed(range(390))), True),
    ("long list", ",".join(r"\sqrt{%d}" % n for n in range(120)),
     ",".join(r"\sqrt{%d}" % (n + 1) for n in reversed(range(120))), False),
    ("long list", ",".join("x^%d" % n for n in range(150)), ",".join("y^%d" % n for n in range(150)), False),
    ("long list", ",".join("(%d,x)" % n for n in range(100)), ",".join("(x,%d)" % n for n in range(100)), False),
    ("long list", ":".join("x" * 350), ":".join("y" * 350), True),
    ("long list", ",".join(r"\pm%d" % n for n in range(30)), "0", False), ("long list", r"\pm" * 300 + "1", "1", False),
    ("long list", r"1\pm2\pm3\pm4\pm5", "1", False),
    ("long list", r"1\pm\sqrt2\pm\sqrt3\pm\sqrt5\pm\sqrt7", "1", False),
    ("long list", r"\begin{pmatrix}" + r"\\".join("&".join("x" * 19) for _ in range(19)) + r"\end{pmatrix}",
     r"\begin{pmatrix}" + r"\\".join("&".join("y" * 19) for _ in range(19)) + r"\end{pmatrix}", False),
    # the study's recursive descent: the stack is no limit that may be relied on, so depth is
    *[("deep nesting", nest(form, "1", count), "2", False) for count in (20, 25, 150) for form in (
        "(#)", "{#}", r"\sqrt{#}", r"\frac{1}{#+x}", "|#|", "(#)!", "-(#)", r"\sin(#)", "[#]", r"\{#\}", "#^{x}",
        "x^{#}", "f(#)", r"\lfloor#\rfloor", "(#,1)", r"\ln #", r"\text{#}", r"\left(#\right)", r"\frac{#}{2}",
        "(#+x)^2", "(#+x)^2+y", "(x+1)(#+y)", r"\boxed{#}", r"\begin{pmatrix}#\end{pmatrix}", r"\sin^{-1} #",
        r"\log_{#}2")],
    ("deep nesting", nest("(#)", "7", 20), "7", True),
    # every operator of the tables repeated to the length of an answer, bare, between ones and between letters
    *[("repeated", (core + piece) * (1990 // (len(piece) + len(core)) if count else 60) + core, "2", None)
      for core in ("", "1", "x") for count in (0, 1) for piece in (
          "+", "-", "*", "/", "^", "_", "!", "'", ",", ";", ":", ".", "=", "<", ">", "|", "(", ")", "[", "]", "{",
          "}", "%", "&", "°", "$", "~", " ", "\\", "\\\\", r"\{", r"\}", r"\cup ", r"\cap ", r"\setminus ", r"\in ",
          r"\pm ", r"\mp ", r"\le ", r"\ne ", r"\frac ", r"\sqrt ", r"\sqrt[", r"\binom ", r"\sin ", r"\ln ",
          r"\log_", r"\sin^", "^{", "_{", "(-1)^{", r"\text{", r"\text{ a}", r"\mathrm{", r"\begin{pmatrix}",
          r"\end{pmatrix}", r"\left(", r"\left|", "e^", r"\lfloor ", r"\infty ", r"\emptyset ", r"\pi ", r"\to ",
          r"\forall ", " and ", " or ", " where ", "1,000", "e-3", "0.\\overline{3}", "\u00bd", "\u00b2", "\u2083",
          "\u221a", " 3/4", "pm", "(C)", "f(", "f(x)=", "x=", "x>", "abc")],
    # a regular expression of the cleaning that backtracks: each repeats what its pattern repeats, and never ends
    *[("backtracking", piece * (1990 // len(piece)) + "\u0663!", "2", None) for piece in (
        r"\text{a", r"\text{{}", "1 000", "1,", "1.", ".1", "1 ", r"\prime", r"^{\prime", "a_{", "a_{{}", '"a ',
        '"a^', "(((x", r"x\in ", " where ", "if ", "{}(", "(){", r"\left", r"\color{", "|x", "12:30 p", "1A", "1e",
        "_5", "the is ", "A ")],
]


def test_torture():
    verdicts = check([(text, gold) for _, text, gold, _ in TORTURE])
    wrong = [(row, verdict) for row, verdict in zip(TORTURE, verdicts) if row[3] not in (None, verdict)]
    assert not wrong, wrong


def test_fuzz_of_the_grammar():
    verdicts = check(list(random_pairs(0, 3000, ANSWERS)))
    assert 0.1 < sum(verdicts) / len(verdicts) < 0.7  # neither all unreadable nor all equal


@pytest.mark.slow
def test_fuzz_of_real_answers(shared_data):
    """20,000 pairs from the grammar, the corpus' golds and the hostile answers, mutated."""
    def texts(name, key):
        lines = (shared_data / "answers" / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)[key][:2000] for line in lines]

    check(list(random_pairs(1, 20_000, texts("labelled.jsonl", "gold") + texts("hostile.jsonl", "pred"))))


def test_verdicts_do_not_depend_on_what_was_asked_before():
    """The same pairs in another order, in another process with another hash seed: sets and caches must not show."""
    pairs = list(random_pairs(2, 500, ANSWERS))
    code = "import json, sys; from redi.answer_checker import answers_match; " \
           "print(json.dumps([answers_match(*pair) for pair in json.load(sys.stdin)]))"
    verdicts = []
    for seed, order in (("1", 1), ("2", -1)):
        done = run_code(code, input=json.dumps(pairs[::order]), PYTHONHASHSEED=seed)
        verdicts.append(json.loads(done.stdout)[::order])
    assert verdicts[0] == verdicts[1] == [answers_match(*pair) for pair in pairs]


def run_code(code, input="", **environment):
    """A process of its own that runs code beside the package."""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(answer_checker.__file__).parent.parent, text=True,
                          input=input, capture_output=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done


def test_threads_from_a_cold_start():
    """Eight threads whose first calls load sympy at once: every one has the serial verdicts.

    Found by the study: mpmath's context and its cache of constants are shared, and not safe to change from two threads.
    """
    pairs = [(r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), (r"\sin\frac\pi3", r"\frac{\sqrt3}{2}"), ("x^2-1", "(x-1)(x+1)"),
             (r"\ln 6", r"\ln 2+\ln 3"), (r"e^{i\pi/3}", r"\frac{1+i\sqrt3}{2}"), (r"\log 250", r"1+\log_{10}25"),
             (r"\ln 6", r"\ln 2+\ln 3.1"), ("(0,1)", "0<x<1"), (r"\binom{2n}{n}", r"\frac{(2n)!}{n!n!}"),
             (RADICALS, "0"), (TINY, "0")]
    code = r"""
import json, sys, threading
from redi.answer_checker import answers_match
assert "sympy" not in sys.modules
pairs = json.load(sys.stdin)
verdicts, barrier = {}, threading.Barrier(8)
def work(k):
    barrier.wait()
    order = pairs[k:] + pairs[:k]  # each thread begins with another pair
    found = [answers_match(*pair) for pair in order]
    verdicts[k] = found[len(pairs) - k:] + found[:len(pairs) - k]
threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps([verdicts[k] for k in range(8)]))
"""
    serial = [answers_match(*pair) for pair in pairs]
    assert json.loads(run_code(code, input=json.dumps(pairs)).stdout) == [serial] * 8


def test_plain_pairs_never_load_sympy():
    """With sympy and mpmath blocked, plain numbers and equal texts still have verdicts, and an import fails aloud."""
    done = run_code(r"""
import sys
sys.modules["sympy"] = sys.modules["mpmath"] = None  # an import of them raises
from redi.answer_checker import answers_match, extract_answer, is_correct
assert answers_match("1/2", "0.50") and answers_match(" +7", "7.0") and not answers_match("0.333", "1/3")
assert answers_match(r"\frac{x}{y}", r"\frac{x}{y}") and answers_match(r"\sqrt 2", r"$\sqrt 2$.")
assert is_correct(r"so \boxed{42}", ["41", "42"]) and extract_answer(r"\boxed{x^2}") == "x^2"
assert not answers_match("x" * 5000, "y")
try:
    answers_match(r"\sqrt 2", "x")
except ImportError:
    print("needs sympy")
""")
    assert done.stdout == "needs sympy\n"


@pytest.mark.parametrize("text", [
    "\\" * 100_000, "{" * 100_000, "}" * 100_000, "{}" * 50_000, r"\boxed" * 50_000, r"\boxed{" * 50_000,
    r"\boxed " * 50_000, r"\boxed{5" * 50_000, "\\boxed" + " " * 100_000, "\\\n" * 50_000, r"\{" * 50_000,
    r"\}" * 50_000,
    ("\\" * 99 + "boxed{") * 1000, r"\fbox{\boxed{" * 20_000 + "}" * 40_000, r"\boxed{x} text $\frac{1}{2}$ " * 70_000],
    ids=lambda text: "%r..." % text[:12])
def test_extraction_is_linear(text):
    """A pattern that may start at each backslash of a run took 10 s for 100,000 of them (facts, section F)."""
    _, seconds, _ = cost(is_correct, text, "5")
    assert seconds < 2  # a quarter of a second for the longest, of 2 MB, on a quiet machine
    assert extract_answer(text + r" \boxed{7") == extract_answer(text)  # a box that never closes changes nothing
