r"""The answer checker against hostile answers: a torture table, and a seeded fuzz of its grammar.

Every call is held to CPU_SECONDS and MEGABYTES, twice what README promises: the promise is measured on a quiet machine
(tests/bench/answer_checker.py --fuzz), and CPU seconds double on a busy one.
"""
import json
import random
import resource
import sys
import threading
import time

import pytest

from redi.answer_checker import answers_match, engine, explain, is_correct

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

ATOMS = r"""0 1 2 3 5 7 10 12 100 0.5 2.75 .4 1,234 10^6 1e5 2e-3 -3 x y n k a_1 x_{n+1} \alpha \pi e i \theta \infty
    \sqrt{2} \frac12 \frac{1}{3} 0.\overline{6} 3\frac{1}{7} 12345678901234567890 101_2 2A_{16} 30^\circ 45° 20\% f(x) f(2)
    AB \hat{x} (C) \text{(B)} \emptyset \mathbb{R} \varnothing""".split()
UNARY = r"""-# (#) \left(#\right) \sqrt{#} \sqrt[3]{#} #^2 #^{-1} (#)^{1/2} (#)! |#| \lfloor#\rfloor \lceil#\rceil \sin(#)
    \cos^2(#) \tan{#} \arcsin(#) \tan^{-1}(#) \ln(#) \log_2(#) \log(#) e^{#} 2^{#} (-1)^{#} \frac{1}{#} {#} \exp(#) \sec(#)
    \sinh(#) \arctan\frac{#}{2} \operatorname{lcm}(#,6) #° #\% \overline{#} #' \text{Answer: }# \text{the value is }#
    #\text{\ cm} #\text{ m}^2 #_{10} #\text{ for all }x""".split()
BINARY = r"""#+# #-# #*# #/# ## #\cdot# \frac{#}{#} #^{#} (#)^{(#)} (#)(#) \binom{#}{#} \log_{#}{#} \max(#,#) \sqrt[#]{#} #\pm#
    #\mp# #:# g(#,#) #\times# #!/#""".split()
OUTER = r"""# x=# #=# #,# #,#,# \{#,#\} (#,#) (#,#),(#,#) [#,#] (#,#] #\cup# (#,#)\cup[#,#) [#,#]\cap(#,#) (#,#)\setminus\{#\}
    x<# x\geq# #<x\leq# x\in[#,#] \{x|x>#\} \{x\in\mathbb{R}:#<x<#\} x<#\text{or}x>#
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
    \frac \frac{ \sqrt \sqrt[ { } ( ) [ ] \{ \} | || ^ ^{ _ _{ + - * / = < > \le \ge \ne , ; : . ! !! %
    $ ' ^\circ \pm \mp \cup \cap \setminus \in \infty \pi e i x y n f( g(x) \sin \cos^2 \log_ \ln \log
    \arcsin \tan^{-1} \binom \lfloor \rfloor \left( \right) \left| \right| \text{ \text{and} \text{cm}
    and or \mathrm{ \mathbb{R} \cdot 1 2 10 0.5 \begin{pmatrix} \end{pmatrix} \begin{cases} \end{cases}
    & \\ 1e5 1e-9 1,000 12345678901234567890 9^9 10^{10} (-1)^ \overline{ \vec{ \boxed{ \boxed \sum \int
    ½ ² ₃ √ π ∞ ≤ ② α " ` ~ # \x \ \forall where if 5th million pm \pmod{ \equiv \approx \langle \rangle
    ⁻ ＋ é 字 ٣ __import__('os') \write18{ 1//0 no \text{not} percent (C) "cm \choice ° # \exp \var \varphi 'x _' \0""".split()


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
