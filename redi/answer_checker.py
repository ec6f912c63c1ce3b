r"""Is this final answer equal to the gold one?  One file on sympy; copy it anywhere (pip install sympy).

    python answer_checker.py '\frac{1}{2}' 0.5
    python answer_checker.py --file rows.jsonl       rows with "gold" and "prediction" or "response"

The public functions, extract_answer, answers_match, is_correct and explain, are at the end.  Who does what: the
grammar is ours, no text reaches eval, sympify or another parser.  sympy keeps sums, products and whole powers canonical
and cancels them in the difference of two answers; roots, functions, e, i and pi are atoms to it, since its own rules
for them can run for hours.  mpmath, at 120 digits, decides whether what did not cancel is zero, at fixed pseudo-random
points if there are variables.  Sets of reals are lists of their ends, matrices tuples of rows.
Refused, and equal to the same text only: sums, integrals, limits, inequalities that are not linear, words that negate
or that are glued to a number, and all past the limits.  Of several readings the usual one is taken: 1\frac{3}{4} is a
mixed number, 1/2x is x/2, log has any one base, (a, b) is a point or an open interval, several variables are positive.
"""
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import sys
import unicodedata
from fractions import Fraction

VERSION = "2.0"

# 1. Limits, and the import of sympy
MAX_CHARS, MAX_TOKENS, MAX_DEPTH = 2000, 800, 24  # of an answer: a longer one, or one with deeper groups, is not read
MAX_DIGITS, MAX_BITS = 1000, 40_000  # of a number in the text, and of one that a power or a factorial makes
MAX_EXPONENT, MAX_FACTORIAL, MAX_SIGNS = 1000, 3000, 4  # of a formula's power; of n in n!; +- in one answer
MAX_WORK = 15_000  # steps of one verdict, each about ten microseconds
PRECISION, MAX_MAGNITUDE = 400, 10**6  # bits of a value at a point (120 digits), and of what is before its point


class Refused(ArithmeticError):
    """Outside the grammar, past a limit, or without a value here."""


def require(condition, why):
    if not condition:
        raise Refused(why)


class Budget:
    """What one verdict may still cost: a count and no clock, so that it depends on the two texts alone."""
    work = MAX_WORK

    def spend(self, work=1):
        self.work -= work
        require(self.work >= 0, "more work than one verdict may cost")


ENGINE = {}


def engine():
    """sympy and mpmath, loaded by the first answer that needs them: one and the same dict in every thread."""
    if "loaded" in ENGINE:
        return ENGINE["loaded"]
    import mpmath
    import sympy
    mp = mpmath.mp.clone()  # nobody else's precision, and nobody changes it: threads may share it
    mp.prec = 4 * PRECISION
    for constant in (mp.pi, mp.e, mp.ln2, mp.ln10):
        mp.mpf(constant)  # mpmath's cache of them is not safe to enlarge from two threads
    mp.prec = PRECISION

    class Call(sympy.Expr):  # a function, or a power that is not whole: Call(name, arguments...), an atom to sympy
        is_commutative = is_Function = True

    fixed = {"pi": [+mp.pi], "e": [+mp.e], "i": [mp.j],  # and the marks, with two readings each
             "°": [mp.one, mp.pi / 180], "%": [mp.one, mp.one / 100], "log?": [+mp.e, mp.mpf(10)]}
    return ENGINE.setdefault("loaded", {**vars(sympy), "mp": mp, "fixed": fixed,
                                        "Call": lambda name, *args: Call(sympy.Symbol(name), *args)})


# 2. Text to tokens: the tables, then clean and tokenize
SYNONYMS = dict(entry.rsplit("=>", 1) for entry in r"""
    cdot=>* times=>* ast=>* div=>/ slash=>/ le=><= leq=><= leqslant=><= ge=>>= geq=>>= geqslant=>>= lt=>< gt=>>
    ne=>!= neq=>!= approx=>~ simeq=>~ ===>= :==>= equiv=>= in=>in notin=>notin cup=>cup cupdot=>cup bigcup=>cup cap=>cap
    setminus=>setminus backslash=>setminus pm=>pm mp=>mp mid=>| \{=>{{ \}=>}} lbrace=>{{ rbrace=>}} lbrack=>[ rbrack=>]
    lparen=>( rparen=>) langle=>( rangle=>) colon=>: ;=>, to=>-> rightarrow=>-> circ=>° degree=>° textdegree=>° \%=>%
    land=>and wedge=>and lor=>or vee=>or prime=>' \\=>newline newline=>newline cr=>newline rfloor=>rfloor rceil=>rceil
    choice=>choice asin=>arcsin acos=>arccos atan=>arctan tg=>tan ctg=>cot arctg=>arctan infinity=>infty inf=>infty
    oo=>infty dfrac=>frac tfrac=>frac cfrac=>frac dbinom=>binom tbinom=>binom varnothing=>emptyset""".split())
DROPPED = set(r"""~ $ " \$ \, \; \: \! \> \( \) \[ \] quad qquad thinspace displaystyle textstyle limits boxed fbox
    underline angle measuredangle triangle bf rm it normalsize large Large nonumber vec overrightarrow text mathrm
    mathbf mathit mathsf mathcal mathfrak mathbb boldsymbol bm""".split()) | {"\\ "}
REFUSED = set("int iint oint sum prod lim limsup liminf ldots dots cdots vdots def write input exists implies".split())
ROWS = set("matrix pmatrix bmatrix smallmatrix array cases aligned align gathered split".split())
TRIGONOMETRIC = set("sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh".split())
FUNCTIONS = TRIGONOMETRIC | {"ln", "log", "lg", "exp", "sqrt"}
LONGEST_FIRST = "|".join(sorted({*FUNCTIONS, "pi"}, key=lambda name: (-len(name), name)))
NAMED = FUNCTIONS | set("abs floor ceil max min gcd lcm arg det deg dim Re Im sgn sign erf rank tr ker".split())
COMMANDS = {*NAMED, *REFUSED, *("begin" + row for row in ROWS), "frac", "binom", "lfloor", "lceil", "infty", "emptyset"}
UNITS = {form % (name + plural): ((dimension, power), Fraction(size)**power) for dimension, units in {
    "metre": "mm:1/1000 millimeter:1/1000 cm:1/100 centimeter:1/100 m:1 meter:1 km:1000 kilometer:1000",
    "foot": "inch:1/12 inche:1/12 in:1/12 ft:1 feet:1 foot:1 yard:3 mile:5280", "clock": "am:1 pm:2",
    "second": "s:1 sec:1 second:1 min:60 minute:60 h:3600 hr:3600 hour:3600 day:86400 week:604800",
    "gram": "mg:1/1000 g:1 gram:1 kg:1000 kilogram:1000", "dollar": "cent:1/100 dollar:1 usd:1"}.items()
         for name, size in (unit.split(":") for unit in units.split()) for plural in ("", "s")[:1 + (len(name) > 2)]
         for form, power in (("%s", 1), ("square %s", 2), ("sq %s", 2), ("%s ^2", 2), ("cubic %s", 3), ("%s ^3", 3))}
MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten
NUMERALS = dict(zip("zero one two three four five six seven eight nine ten eleven twelve".split(), range(13)))
NEGATIONS = set("no not except without never neither nor non".split())
WORDS = {*UNITS, *MULTIPLIERS, *NUMERALS, *NEGATIONS, *"""the is are mph rpm per percent degree degrees radian radians
    unit square cubic sq lb lbs oz ml kcal all any yes th st nd rd where such given since because provided with for if
    when as""".split()} - {"s", "m", "h", "g"}
GLUED = re.compile(r"(?<=[\d}])(?!square|cubic|degrees?|[A-Z]+$)(?:[A-Za-z]{13}|[a-z]*[A-Z](?=[A-Za-z]{3}))")
UNICODE = {word[0]: word[1:] + " " * (word[1:2] == "\\") for word in r"""
    −- –- —- ‐- ×* ·* ∙* ⋅* ÷/ ∕/ ⁄/ ≤<= ⩽<= ≥>= ⩾>= ≠!= ≈\approx ≡\equiv ∞\infty ∪\cup ∩\cap ∈\in ∉\notin √\sqrt ∶:
    ∛\sqrt[3] °\degree º\degree ∘\circ ±\pm ∓\mp ∅\emptyset ∣| →\to ′' ″'' ‘' ’' “ ” ⟨\langle 〈\langle ⟩\rangle ∠
    〉\rangle ⌊\lfloor ⌋\rfloor ⌈\lceil ⌉\rceil ∧\land ∨\lor ∖\setminus ￥$ ¥$ £$ €$ ¢cents ℝR ℤZ ℕN ℚQ ℂC
    ①,1 ②,2 ③,3 ④,4 ⑤,5 ⑥,6 ⑦,7 ⑧,8 ⑨,9""".split()}
UNICODE.update({char: mark + "{%s}\0" % plain for mark, chars in (("^", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"), ("_", "₀₁₂₃₄₅₆₇₈₉"))
                for char, plain in zip(chars, "0123456789+-n")})


def word(match, font=""):
    """A run of letters: words with a quote before each, functions with a backslash, variables as they are."""
    word, text = match[0], match.string
    low, name, roman = word.lower(), SYNONYMS.get(word, word), font in ("mathrm", "operatorname")
    before, after = text[:match.start()].rstrip(" ~\\,")[-1:], text[match.end():match.end() + 9].lstrip()[:1]
    if low in ("and", "or"):
        return r"\l%s " % low
    if name in NAMED and (roman or not font) or not font and (
            name in ("infty", "alpha", "theta") or low == "in" and after in ("[", "(", "{", "\\")):
        return "\\%s " % name
    if font:  # \mathrm{m} is a metre, \mathrm{e} a number
        return word if roman and len(word) == 1 and word not in "msghNJWVKL" else '"%s ' % (low if low[1:] else word)
    if low in UNITS:
        is_word = len(word) > 2 or word == low and (before.isdigit() or before == "}")
    else:
        is_word = low in WORDS and (len(word) > 2 or not after or after.isalnum() or after in ".,")
    return '"%s ' % low if is_word or len(word) > 3 and after not in ("^", "_") else word


REWRITES = [(trigger, re.compile(pattern), new) for trigger, pattern, new in (  # where the text has the trigger
    ("\\", r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", " "),
    ("", r"(?<=\d)\s*(?:,\s*\\!|\{,\}|\\[,;: !]|~)\s*(?=\d{3}(?!\d))", ""),  # 1{,}000 and 1\,000
    (" ", r"(?<![\d.,\w}])\d{1,3}(?: \d{3})+(?![\d.])", lambda match: match[0].replace(" ", "")),
    (".", r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", lambda match: r"(%s.%s0+\frac{%s}{%s})" % (
        match[1] or 0, match[2], match[3], "9" * len(match[3]) + "0" * len(match[2]))),
    (":", r"(?i)(\d[\s~]*(?:\\(?:text|mathrm|mbox)\s*\{\s*|\\[ ,])?)([ap])\.?\s?m(?![a-z^_])\.?",
     lambda match: match[1] + match[2].lower() + "m "),
    ("\\begin", r"(?:,\s*(?=&)|\\\\\s*(?=\\end))", ""),  # at the end of a cell or of a matrix
    ("\\begin", r"\\(begin|end)\s*\{([a-z]*)\*?\}(?:\s*[\[{][lcr|\s]*[\]}])?", r"\\\1\2 "),
    ("\\", r"\\(text(?:bf|it|rm|sf|tt|sc|normal)?|mbox|hbox|emph|mathrm|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
     lambda match: " %s " % re.sub(r"(?<!\\)\b[A-Za-z]+", functools.partial(word, font=match[1]), match[2])),
    ("", r'(?<![\\A-Za-z"])([a-z]?)(%s)([a-z]?)(?![A-Za-z])' % LONGEST_FIRST, r"\1\\\2 \3"),  # xsinx
    ("", r'(?<![\\A-Za-z"])[A-Za-z]{2,}', word),
    ('"', r'\\frac\s*\{\s*("[^{}]*)\}\s*\{\s*("[^{}]*)\}', r"\1/\2"),  # miles over hours
    ('"', r'(?<=[\w})])\s*"(%s)\s' % "|".join(MULTIPLIERS), lambda match: r"\cdot 10^{%d} " % MULTIPLIERS[match[1]]),
    ('"', r'(?:^|(?<=[,=({])|(?<=\\lor)|(?<=\\land))\s*"(%s)\s' % "|".join(NUMERALS),
     lambda match: " %s " % NUMERALS[match[1]]),
    ("", r'^\s*(?:"(?:the|answer|is|option|choice)\s+)*[\s($]*"?([A-J])[\s).$]*$', r"\1"),  # a choice
    ("", r'^\s*\(?\s*"?([A-J])\s*[).]\s+(?=[\w\\$.(-])', r"\1\\choice "),  # (C) 12
    ("", r'^(?:\s*\\approx|(?:\s*"[a-z]+ )+\s*:)', ""),  # Answer: 5
    ('"', r'"(percent|degree)s? ', lambda match: {"percent": r"\% ", "degree": r"\degree "}[match[1]]),
    ('"', r'"all\s+"real(?:s|\s+"numbers)', "R"), ("**", r"\*\*", "^"), ("\\ ", r"(?<!\\)\\ ", " "),
    ("", r'(?<=\S)[\s,;(]*(?:"(?:where|such|given|since|because|provided|with)\s|\\forall|"(?:if|when|for|as)\s'
     r'(?!.*(?:,|\\land|\\lor|"if|"otherwise)))(?:[^()\[\]{}]|\{[^{}]*\}|\([^()]*\))*\)?$', ""),  # a remark
    (r"\in", r"(?<=[^\s,;(])\s*[,;(]\s*\(?[A-Za-z]\s*\\in\s*(?:\\mathbb|\\mathbf)?\s*\{?\s*[ZNQ]\s*\}?\s*\)?\s*$", ""),
    (r"\{", r"\\\{\s*\\\}", r"\\emptyset "),
    (r"\{", r"^\\\{\s*\\?[A-Za-z]+\s*(?:\\in\s*(?:\\mathbb\s*)?\{?[A-Z]\}?\s*)?(?:\||\\mid\b|:)(.*)\\\}$", r"\1"),
    ("]", r"^\](.*)([\[\]])$", lambda match: "(" + match[1] + {"[": ")", "]": "]"}[match[2]]),  # ]0,1[
    ("\\var", r"\\var(phi|epsilon|theta)(?![a-z])", r"\\\1 "), ("\\", r"\\[lr]?[vV]ert(?![a-z])\s*|\\\|", "|"),
    ("|", r"\|([^|]*)\|", r"\\abs(\1)"),
    ("\\", r"(\\[dtc]?frac|\\[dt]?binom)\s*(\d\s*\d?)", lambda match: match[1] + re.sub(r"(\d)\s*", r"{\1}", match[2])),
    ("/", r"(?<![\w.,/^_\\}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # 1 3/4
    ("frac", r"(?<![\w.,/^_\\}])(\d+)\s*\\[dtc]?frac\{(\d+)\}\s*\{(\d+)\}", lambda match: (
        r"(%s+\frac{%s}{%s})" % match.groups() if 0 < int(match[2]) < int(match[3]) else match[0])),
    ("\\", r'(?:\^\s*\{\s*\\(?:circ|degree)\s*[CF]?\s*\}|\^?\s*\\(?:circ|degree)\b)\s*(?:"?[CF]\b)?', r"\\degree "),
    ("/", r"(?<=[\w})])/([A-Za-z]{2,})(?![A-Za-z(_^])", r"/(\1)"),  # t/RC
    ("prime", r"\^\s*(?:\{\s*(?:\\prime\s*)+\}|\\prime(?![A-Za-z]))", lambda match: "'" * match[0].count("prime")),
    ("^", r"(?<![A-Za-z\\])([fgh])\s*\^\s*\{\s*-\s*1\s*\}\s*(?=\()", r"\1_{-1}"),  # an inverse function
    ("^", r'\^\s*\{\s*"?(?:th|st|nd|rd)\s*\}', ""))]
TOKEN = re.compile(r"""\s*(?:
    (?P<n>(?:\d[\dA-F]{,60}+(?=_(?:\{1[1-6]\}|1[1-6]))|\d+(?:\.\d+)?|\.\d+)
        (?:[eE](?:-?\d{1,3}|\+\d{2,3})(?!\d|\.\d))?(?:_(?:\{[\s"]*\w+\s*\}|\d+|[A-Za-z]))?)'*
    |(?P<w>(?:"[A-Za-z]+\s*(?:\^\s*(?:\{\s*-?\d+\s*\}|-?\d+)\s*)?(?:[/*.]\s*(?="))?)+)
    |(?P<v>(?:\\(?:overline|hat|bar|dot|ddot|tilde|widehat|widetilde)\s*(?:\{[^{}]*\}|[A-Za-z])|[A-Za-z]
        |\\(?!(?:%s)(?![A-Za-z]))[A-Za-z]+)(?:\s*_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\d+|\\?[A-Za-z]+)|\s*')*)
    |\\(?P<c>[A-Za-z]+)
    |(?P<o>\\.|<=|>=|!=|==|:=|->|\.\.\.|\S))""" % "|".join(
        sorted(filter(str.isalpha, {*COMMANDS, *DROPPED, *SYNONYMS, *("end" + row for row in ROWS)}))), re.VERBOSE)


def clean(text):
    """Strict text: one spelling for everything, words quoted, functions with a backslash, remarks cut off."""
    text = text.strip(" \t\r\n")
    if not text.isascii() or not text.isprintable():
        text = "".join(map(plain_character, text)).lstrip(",")
        text = re.sub("}\0[_^]{", "", text).replace("\0", "")  # scripts beside each other are one
    if "\\\\" in text and r"\begin" not in text.replace(r"\\begin", ""):  # escaped once too often, as JSON does
        text = re.sub(r"\\\\(?=[A-Za-z{}()\[\]%$,;!|])", r"\\", text)
    require(not GLUED.search(text), "words glued to a number")
    for trigger, pattern, new in REWRITES:
        if trigger in text:
            text = pattern.sub(new, text)
    return text.lstrip(" =,:$").rstrip(" .,;\\$")


def plain_character(char):
    if char.isascii():
        return char if char >= " " else {"\f": "\\f", "\b": "\\b"}.get(char, " ")  # \frac, read as an escape
    name, plain = unicodedata.name(char, ""), unicodedata.normalize("NFKC", char)
    if greek := re.fullmatch("GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", name.replace("LAMDA", "LAMBDA")):
        return "\\%s " % (greek[2].lower() if greek[1] == "SMALL" else greek[2].capitalize())
    if "\N{FRACTION SLASH}" in plain and char not in UNICODE:
        return r"\frac{%s}{%s}" % tuple(part or "1" for part in plain.split("\N{FRACTION SLASH}"))
    return UNICODE.get(char, "" if unicodedata.category(char) in ("Cf", "Cc") else plain)


def tokenize(text):
    """[(kind, value)] of clean text: n(umber), v(ariable), c(ommand), w(ords), o(perator)."""
    tokens = []
    for match in TOKEN.finditer(text):
        kind, value = match.lastgroup, match[match.lastgroup]
        if kind == "w":
            value = " ".join(re.findall(r"[A-Za-z]+|\^[\s{]*-?\d+", value)).replace("{", "")
            if tokens and tokens[-1][0] == "w":
                value = tokens.pop()[1] + " " + value
        elif kind in ("n", "v"):
            value = re.sub(r'[\s"{}\\]', "", value) if len(value) > 1 else value
        elif value in DROPPED:
            continue
        else:
            value = SYNONYMS.get(value, value)
            kind = "c" if value in COMMANDS else "o"
        tokens.append((kind, value))
    require(len(tokens) <= MAX_TOKENS, "more than %d tokens" % MAX_TOKENS)
    return tokens


# 3. Safe construction: nothing else in this file makes or combines sympy objects
# Why no text can hang it.  A text is short, and so are its numbers; only powers and factorials make longer ones, which
# are limited and charged to the budget, as is the common denominator of a sum.  sympy gets rationals, symbols, Calls,
# their sums, products and whole powers, and makes these canonical in polynomial time; it gets no root, function, e, i,
# pi or infinity that it would know as such, so it never asks whether a number is zero, positive or finite: there it
# would evaluate without a limit.
def build(kind, *args):
    return (ENGINE.get("loaded") or engine())[kind](*args)


number, symbol, call = (functools.partial(build, kind) for kind in ("Rational", "Symbol", "Call"))


def add(terms, budget):
    bits = sum(term.as_coeff_Mul()[0].q.bit_length() for term in terms)  # of their common denominator
    budget.spend(len(terms) * (bits // 1000) ** 2 // 8)
    return build("Add", *terms)


def multiply(*factors):
    others = [factor for factor in factors if not factor.is_Rational]
    if not others:
        return math.prod(factors, start=number(1))
    if all(factor.p for factor in factors if factor.is_Rational):
        return build("Mul", *factors)
    for constant in itertools.filterfalse(symbols, others):  # 0 times 1/0 is no answer, and sympy would ask if it is
        Point(Budget()).value(constant)
    return number(0)


def power(base, exponent, budget):
    """base ** exponent: exact if it is rational, sympy's own if the exponent is whole, else a Call."""
    if base.is_Rational and exponent.is_Rational:
        top, bottom, whole = exact_root(base.p, exponent.q), exact_root(base.q, exponent.q), exponent.p
        top, bottom, whole = (top, bottom, whole) if whole >= 0 else (bottom, top, -whole)
        require(bottom != 0, "division by zero")
        if None not in (top, bottom):
            bits = max(top.bit_length(), bottom.bit_length())
            whole = whole if bits > 1 or not whole else 2 - whole % 2  # of 0, 1 and -1
            if bits * whole <= MAX_BITS:
                budget.spend(bits * whole // 12)
                return number(top**whole, bottom**whole)
    elif exponent.is_Integer and abs(exponent.p) <= MAX_EXPONENT:
        require(exponent.p > 0 or symbols(base) or Point(budget).value(base), "division by zero")
        coefficient, _ = base.as_coeff_Mul()
        bits = (coefficient.p.bit_length() + coefficient.q.bit_length()) * abs(exponent.p)
        if bits <= MAX_BITS:
            budget.spend(bits // 12)
            return build("Pow", base, exponent)
    return call("^", base, exponent)


def exact_root(n, degree):
    """The integer of which n is the power, or None; negative for negative n and odd degrees."""
    if degree > 1 and (n < 0 and degree % 2 == 0 or n.bit_length() > 2000 or degree > 1000):
        return None
    root, exact = build("integer_nthroot", abs(n), degree) if degree > 1 else (abs(n), True)
    return int(-root if n < 0 else root) if exact else None


def inverse(x, budget):
    return power(x, number(-1), budget)


def combinatorial(name, args, budget):
    """n! or a binomial coefficient: exact for whole numbers, else a Call (in factorials, n would be there twice)."""
    if not all(x.is_Integer for x in args):
        budget.spend(150)  # x!!!... is a deep expression, and the stack is not
        return call(name, *args)
    n, k = args[0].p, args[-1].p
    length = n if name == "!" else min(k, abs(n - k))
    require(n >= 0 <= k and length * n.bit_length() <= MAX_BITS, "a factorial past the limits")
    budget.spend(length * n.bit_length() // 12)
    return number(math.factorial(n) if name == "!" else math.comb(n, k))


# 4. The parser: tokens to sympy expressions, and to Nodes for what is no expression
@dataclasses.dataclass(frozen=True)
class Node:
    """note: a list's joint, an interval's ends, a relation's operators, a unit's words, a base's digits, a sign."""
    kind: str  # list, set, tuple, matrix, row, interval, cup, relation, unit, ratio, base, choice, infinity...
    parts: tuple = ()
    note: str = ""
    is_Symbol = is_Rational = is_Function = False  # as sympy's objects say of themselves


def kind(x):
    return x.kind if isinstance(x, Node) else ""


def members_of(x):
    """Of a list, a set, a tuple, or a matrix of one row or column; x itself if it is none of these."""
    if kind(x) == "matrix":
        rows = [row.parts for row in x.parts]
        return rows[0] if len(rows) == 1 else sum(rows, ()) if all(len(row) == 1 for row in rows) else ()
    return x.parts if kind(x) in ("list", "set", "tuple") else (x,)


def scalar(x):
    """The expression that x is or holds."""
    require(kind(x) in ("", "unit", "base"), "a list, relation or the like inside a formula")
    return scalar(x.parts[0]) if kind(x) else x


def times(x, y):
    """A product; a number times a tuple, a matrix or a quantity goes into it."""
    node, factor = (x, scalar(y)) if kind(x) else (y, x)
    if kind(node) in ("tuple", "matrix", "row", "unit"):
        require(len(factor.args) < 20, "a tuple or matrix times a long formula")
        return Node(node.kind, tuple(times(part, factor) for part in node.parts), node.note)
    if kind(node) == "infinity" and factor.is_Rational and factor.p:
        return Node("infinity", (), "+" if (factor.p > 0) == (node.note == "+") else "-")
    return multiply(scalar(node), factor)


def negative(x):
    return times(number(-1), x)


class Parser:
    """Recursive descent; each method reads from token i on."""
    KINDS = ("choice", "list", "row", "list", "relation", "", "ratio")  # and below the operators that make them
    LEVELS = {joint: level for level, joints in enumerate((
        ["choice"], ["newline"], ["&"], [",", "and", "or"], ["=", "<", ">", "<=", ">=", "!=", "~", "in", "notin", "->"],
        ["cup", "cap", "setminus"], [":"])) for joint in joints}
    CLOSERS = {"(": (")", "]"), "[": (")", "]"), "{": ("}",), "{{": ("}}",),
               **{"begin" + row: ("end" + row,) for row in ROWS}}
    APPLICATION = re.compile(r"\((?:\d+\)|\w\)=|[^()]*,[^()]*\))")

    def __init__(self, tokens, budget):
        self.tokens, self.budget = [*tokens, ("o", "the end"), ("o", "the end")], budget
        self.i, self.depth, self.radians = -1, 0, False  # radians: in sin and the like, where a degree is pi/180
        self.step()

    def step(self):
        self.i += 1
        self.kind, self.value = self.tokens[self.i]
        self.level = self.LEVELS.get(self.value, -1) if self.kind == "o" else -1
        self.starts = self.kind in ("n", "v", "c") or self.value in ("(", "{", "{{")  # a factor

    def accept(self, *values):
        """The operator or command here if it is one of these, stepped over; else None."""
        value = self.value
        if value not in values or self.kind not in ("o", "c"):
            return None
        self.step()
        return value

    def nested(self, rule, *closers):
        """One level deeper: what a rule reads up to one of the closing tokens."""
        self.depth += 1
        require(self.depth <= MAX_DEPTH, "groups nested too deep")
        x = rule()
        require(self.accept(*closers) or not closers, "unbalanced brackets, or something left over")
        self.depth -= 1
        return x

    def signed(self, rule):
        sign, x = self.accept("-", "+"), rule()
        return negative(x) if sign == "-" else x

    def members(self, level=0):
        """Sums, and what operators of at least a level make of them: lists, relations, unions, ratios."""
        x = self.sum()
        while (found := self.level) >= level:
            parts, joints = [x], []
            while self.level == found:
                joints.append(self.accept(self.value))
                while self.level == found == 3:  # ", and"
                    joints[-1] = self.accept(self.value)
                parts.append(self.members(found + 1))
            if len(set(joints)) > 1 and found == 5:
                require(len(joints) <= MAX_DEPTH, "too many unions and differences")
                x = functools.reduce(lambda x, pair: Node(pair[0], (x, pair[1])), zip(joints, parts[1:]), x)
            else:
                if set(joints) <= {">", ">="}:
                    parts, joints = parts[::-1], ["<" + joint[1:] for joint in joints[::-1]]
                note = next((joint for joint in ("or", "and") if joint in joints), joints[0])
                x = Node(self.KINDS[found] or note, tuple(parts), " ".join(joints) if found == 4 else note)
        return x

    def sum(self):
        terms = []
        while True:
            signs = [self.accept("+", "-"), self.accept("+", "-")]
            if terms and not any(signs):
                return terms[0] if len(terms) == 1 else add(list(map(scalar, terms)), self.budget)
            term = self.product()
            terms.append(negative(term) if signs.count("-") == 1 else term)

    def product(self):
        """Factors beside each other and with * and / between them; then perhaps a unit."""
        start, factors = self.i, [self.factor()]
        while True:
            value = self.value
            if self.accept("*", "/"):
                start, factor = self.i, self.signed(self.factor)
                factors.append(inverse(scalar(factor), self.budget) if value == "/" else factor)
            elif self.kind == "w":
                self.step()
                x = functools.reduce(times, factors)
                plain = NEGATIONS.isdisjoint(value.split()) and not self.starts
                require(plain and (value in UNITS or not is_name(x)), "words in a formula, or that change its meaning")
                factors = [x if kind(x) in ("unit", "list") else Node("unit", (x,), value)]
            elif self.starts:
                digits = self.kind == "n" and self.i == start + 1 and self.tokens[start][0] in ("n", "v")
                require(not digits, "a number after a number")
                start = self.i
                factors.append(self.factor())
            else:
                plain = factors[1:] and not any(map(kind, factors))
                return multiply(*factors) if plain else functools.reduce(times, factors)

    def factor(self):
        """An atom and the marks behind it."""
        x = self.atom()
        while mark := self.accept("^", "°", "%", "!"):
            if mark == "^":
                x = call("*", scalar(x)) if self.accept("*") else power(scalar(x), self.script(), self.budget)
                require(self.value != "^", "a power of a power without braces")
            elif mark == "!":
                x = combinatorial(mark, [scalar(x)], self.budget)
            else:
                x = times(x, multiply(symbol("pi"), number(1, 180)) if mark == "°" and self.radians else symbol(mark))
        return x

    def script(self):
        return scalar(self.nested(functools.partial(self.signed, self.atom)))

    def atom(self):
        token, value = self.kind, self.value
        self.budget.spend()
        self.step()
        if token in ("n", "v") or token == "c" and value not in self.CLOSERS:
            return {"n": self.number, "v": self.name, "c": self.command}[token](value)
        if token == "w" and not self.starts and self.value not in ("-", "["):
            return symbol('"' + value)
        if token == "w":  # prose
            x = self.nested(functools.partial(self.signed, self.factor))
            lone = is_name(x) and not self.starts and self.level < 4 and self.value not in ("+", "-", "*", "/")
            require(NEGATIONS.isdisjoint(value.split()) and not lone, "words that change the meaning")
            return x
        require(value in self.CLOSERS, "an operator without an operand")
        x = self.nested(self.members, *self.CLOSERS[value])
        ends, several = value + self.tokens[self.i - 1][1], kind(x) == "list"
        if value.startswith("begin"):
            rows = x.parts if several and x.note == "newline" else (x,)
            matrix = Node("matrix", tuple(row if kind(row) == "row" else Node("row", (row,)) for row in rows))
            return matrix if value.endswith(("matrix", "array")) else x
        if value == "{{" or value == "{" and several:
            return Node("set", x.parts if several else (x,))
        if not several:
            require(ends in ("()", "[]", "{}"), "unbalanced brackets")
            return Node("tuple", (x,)) if ends == "[]" and self.value != "^" else x
        return Node("tuple", x.parts) if ends == "()" or len(x.parts) != 2 else Node("interval", x.parts, ends)

    def number(self, text):
        """A numeral: 12, 0.5, 2e-3, 204_5; int raises ValueError where a digit is no digit of the base."""
        digits, _, base = text.partition("_")
        require(len(text) <= MAX_DIGITS, "a number of too many digits")
        if base:
            base = int(base) if base.isdecimal() else int(NUMERALS.get(base, 0))
            require(1 < base <= 36, "a bad base")
            return Node("base", (number(int(digits, base)),), digits)
        return number(int(digits)) if digits.isdigit() else number(*Fraction(digits).as_integer_ratio())

    def name(self, name):
        """A variable; before brackets perhaps a function: f(x), f(2), g(x, y) but not n(n+1)."""
        ahead = "".join(token[1] for token in self.tokens[self.i:self.i + 14]) if self.value == "(" else ""
        if not self.APPLICATION.match(ahead) and (not ahead or re.split("[_']", name)[0] not in set("fghFGH")):
            return symbol(name)
        self.step()
        return call(name, *map(scalar, members_of(self.nested(self.members, ")"))))

    def command(self, name):
        require(name not in REFUSED, "\\%s is not supported" % name)
        if name == "frac":
            top = self.nested(self.atom)
            return times(top, inverse(scalar(self.nested(self.atom)), self.budget))
        if name == "binom":
            return combinatorial(name, [scalar(self.nested(self.atom)), scalar(self.nested(self.atom))], self.budget)
        if name == "sqrt":
            degree = scalar(self.nested(self.members, "]")) if self.accept("[") else number(2)
            return power(scalar(self.nested(self.atom)), inverse(degree, self.budget), self.budget)
        if name in ("lfloor", "lceil"):
            return call(name[1:], scalar(self.nested(self.members, "rfloor", "rceil")))
        if name in ("infty", "emptyset"):
            return Node("infinity", (), "+") if name == "infty" else Node("set")
        return self.function(name)

    def function(self, name):
        """A function with its power, its base and its argument."""
        exponent = base = None
        while mark := self.accept("^", "_"):
            script = self.script()
            exponent, base = (script, base) if mark == "^" else (exponent, script)
        if exponent == number(-1) and "arc" + name in FUNCTIONS:
            name, exponent = "arc" + name, None
        outer, self.radians = self.radians, self.radians or name in TRIGONOMETRIC
        args = [scalar(x) for x in members_of(self.nested(self.argument))]
        self.radians, budget = outer, self.budget
        require(base is None or name == "log", "a subscript on %s" % name)
        require(len(args) == 1 or args and name not in FUNCTIONS | DEFINED, "a function of several values")
        x = args[0]
        if name in ("log", "lg"):
            base = base or (symbol("log?") if name == "log" else number(10))
            x = multiply(call("ln", x), inverse(call("ln", base), budget))
        elif name[-3:] in RECIPROCAL:  # sec x = 1 / cos x, arcsec x = arccos (1 / x)
            other = name[:-3] + RECIPROCAL[name[-3:]]
            x = call(other, inverse(x, budget)) if name[0] == "a" else inverse(call(other, x), budget)
        else:
            x = power(symbol("e"), x, budget) if name == "exp" else call(name, *args)
        return x if exponent is None else power(x, exponent, budget)

    def argument(self):
        """Brackets, or factors before the next function, bracket or operator: sin 2x cos x."""
        if self.value in self.CLOSERS:
            return self.atom()
        x = self.signed(self.factor)
        while self.starts and self.value not in NAMED and self.value not in self.CLOSERS:
            x = times(x, self.factor())
        return x


# 5. Values at a point
MARKS = {"°", "%", "log?"}  # symbols with two readings: 1 or pi/180, 1 or 1/100, base e or 10
FIXED = MARKS | {"pi", "e", "i"}
DEFINED = set("^ ln sin cos tan sinh cosh tanh arcsin arccos arctan abs floor ceil ! binom".split())
RECIPROCAL = {"sec": "cos", "csc": "sin", "cot": "tan"}


def walk(*xs):
    """Every Node and expression in some, themselves included; not the names of Calls."""
    stack = list(xs)
    while stack:
        x = stack.pop()
        yield x
        stack.extend(x.parts if kind(x) else x.args[1:] if x.is_Function else x.args)


def symbols(*xs):
    """The names in expressions and Nodes that have no fixed value, functions that nobody defined included."""
    atoms = (x for x in walk(*xs) if x.is_Symbol or x.is_Function)
    return {x.name if x.is_Symbol else x.args[0].name for x in atoms} - FIXED - DEFINED


class Point:
    """Sample point number trial, with a reading (0 or 1) of each mark.
    What keeps false zeros out: a sum counts as zero below 2**-300 of its largest term, and has no value if a term is
    above 2**150 or too small beside another; a number has none beyond 180 bits, a function none of what is too extreme.
    """
    def __init__(self, budget, trial=0, mode="positive", real=False, readings=()):
        self.budget, self.trial, self.mode, self.real = budget, trial, mode, real
        self.readings, self.mp = dict(readings), engine()["mp"]

    def magnitude(self, v):
        """About log2 |v|, within the limit of all values."""
        m = self.mp.mag(v) if v else -MAX_MAGNITUDE
        require(m <= MAX_MAGNITUDE, "a value past the limits, or none")
        return int(m)

    def value(self, x):
        self.budget.spend()
        if x.is_Rational:
            require(max(x.p.bit_length(), x.q.bit_length()) <= 180, "a number of more than 180 bits in a formula")
            return self.mp.mpf(x.p) / x.q if x.q > 1 else self.mp.mpf(x.p)
        if x.is_Symbol:
            return self.variable(x.name)
        if x.is_Pow:
            v = self.value(x.base) ** x.exp.p
        elif x.is_Function:
            v = self.function(x.args[0].name, [self.value(arg) for arg in x.args[1:]], x.args[-1])
        elif x.is_Mul:
            v = math.prod(map(self.value, x.args))
        else:
            v = [self.value(arg) for arg in x.args]
            sizes = [self.magnitude(term) for term in v if term] or [0]
            require(max(sizes) <= 150 and max(sizes) - min(sizes) <= 140, "a sum of terms of very different size")
            v = sum(v, self.mp.zero)
            v = v.real if self.magnitude(v.imag) <= max(sizes) - 300 else v
            v = v if self.magnitude(v) > max(sizes) - 300 else self.mp.zero
        self.magnitude(v)
        return v

    def variable(self, name):
        require(name != "i" or not self.real, "a complex value")
        if name in FIXED:
            return engine()["fixed"][name][self.readings.get(name, 0)]
        seed = ("%s %d" % (name, self.trial)).encode("utf-8", "replace")
        n = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "big")
        if self.mode == "whole":
            return self.mp.mpf(3 + n % (4 + 2 * self.trial))
        low, high = ((100, 8000), (10_000, 40_000), (40_000, 120_000))[self.trial % 3]
        return self.mp.mpf(low + n % (high - low)) / (-9973 if self.mode == "signed" and self.trial % 2 else 9973)

    def function(self, name, args, exponent):
        mp, v = self.mp, args[0]
        if name not in DEFINED:
            return self.variable("%s(%s)" % (name, ", ".join(mp.nstr(mp.mpc(arg), 30) for arg in args)))
        extreme = [arg for arg in args if arg and not -100 < self.magnitude(arg) < (6 if name == "tanh" else 60)]
        require(name == "abs" or not extreme and (v or name != "ln"), "a function of zero, or of what is too extreme")
        if name == "^":  # of negative numbers the odd roots are the real ones
            odd = isinstance(v, mp.mpf) and v < 0 and exponent.is_Rational and exponent.q % 2
            v = (-v) ** args[1] * (-1 if odd and exponent.p % 2 else 1) if odd else v ** args[1]
            require(v == 1 or self.magnitude(v - 1) > -290, "a power too close to 1")
        elif name in ("floor", "ceil", "!", "binom"):
            near = [int(mp.nint(arg.real)) for arg in args]
            whole = all(isinstance(arg, mp.mpf) and self.magnitude(arg - n) < -300 for arg, n in zip(args, near))
            if name in ("floor", "ceil"):
                v = mp.mpf(near[0]) if whole else getattr(mp, name)(v)
            else:
                require(whole and 0 <= min(near) and max(near) <= MAX_FACTORIAL, "a factorial outside its limits")
                v = mp.mpf(math.factorial(near[0]) if name == "!" else math.comb(*near))
        else:
            v = abs(v) if name == "abs" else getattr(mp, name.replace("arc", "a"))(v)
            v = v if self.magnitude(v) > -300 else mp.zero
        self.budget.spend(5 if isinstance(v, mp.mpf) else 20)
        require(isinstance(v, mp.mpf) or not self.real, "a complex value")
        return v


# 6. Equality by type
EVERYTHING = [(-math.inf, False), (math.inf, False)]


def is_name(x):
    return x.is_Symbol and x.name not in FIXED  # a variable, or words


def is_label(x, simple=False):
    """May x name a value, as in x = 5: x, f(2), sin A, (x, y); unless simple, m + n, AB and a : b, but not 2x?"""
    if kind(x):
        kinds = ("tuple",) if simple else ("tuple", "ratio")
        return kind(x) in kinds and all(is_label(part, simple) for part in x.parts)
    names_a_value = is_name(x) or x.is_Function and x.args[0].name not in DEFINED - TRIGONOMETRIC and bool(symbols(x))
    return names_a_value or not simple and bool(symbols(x)) and not any(y.is_Rational for y in walk(x))


def unknown(x):
    """The one unknown of relations, a symbol or the likes of f(x); None if there is none or are several."""
    sides = [side for relation in walk(x) if kind(relation) == "relation" for side in relation.parts]
    found = {side for side in sides if is_label(side, simple=True)} or set(map(symbol, symbols(x)))
    return found.pop() if len(found) == 1 else None


@dataclasses.dataclass
class Equality:
    """Is one reading equal to another?"""
    budget: Budget

    def equal(self, a, b):
        kinds = {kind(a), kind(b)}
        self.budget.spend(1 if kinds == {""} else 8)
        if len(kinds) == 1 and a == b:
            return True
        if kinds == {""}:
            x = a if a.is_Rational and b.is_Rational else add([a, negative(b)], self.budget)
            return not x.is_Rational and self.holds(lambda v: not v, x)
        if "unit" in kinds:  # optional, but 2 cm is not 2 m and 3 am is not 3 pm
            (one, size), (two, other) = (UNITS.get(x.note if kind(x) == "unit" else "", ("", 1)) for x in (a, b))
            ratio = Fraction(size) / other if one == two else Fraction(1)
            a, b = (x.parts[0] if kind(x) == "unit" else x for x in (a, b))
            a = a if ratio == 1 else times(number(*ratio.as_integer_ratio()), a)
            return (ratio == 1 or one[0] != "clock") and self.equal(a, b)
        if self.same_reals(a, b):
            return True
        if kinds <= {"list", "set"}:
            return self.same_members(a, b)
        if len(kinds) == 2:
            return any(self.equal(x, b) for x in self.views(a, b)) or any(self.equal(a, x) for x in self.views(b, a))
        if kinds == {"relation"}:
            return self.same_relation(a, b)
        if kinds == {"ratio"} and number(0) not in a.parts + b.parts:  # 1:2:3 and 2:4:6, but not the time 10:00
            a, b = (Node("ratio", tuple(times(x, y.parts[0]) for x in z.parts)) for y, z in ((a, b), (b, a)))
        same = a.note == b.note or a.kind == "base"
        return same and len(a.parts) == len(b.parts) and all(map(self.equal, a.parts, b.parts))

    def views(self, x, other):
        """What x may mean beside another kind of answer."""
        if kind(x) == "choice" or kind(x) == "set" and len(x.parts) == 1:
            return x.parts
        if kind(x) == "base" and x.note.isdigit():  # 52_8 and 52, where the question names the base
            return [number(int(x.note))]
        if kind(x) == "ratio" and len(x.parts) == 2:  # 1:2 and 1/2
            return [times(x.parts[0], inverse(scalar(x.parts[1]), self.budget))]
        if kind(x) == "relation":
            return [x.parts[1]] if x.note == "in" else self.values(x)
        return [Node("tuple", members_of(x))] if kind(x) in ("list", "matrix") and kind(other) == "tuple" else []

    def holds(self, test, *xs):
        """Does a test of values hold, in some reading of the marks, at enough of 24 points that have values?"""
        names, parts = symbols(*xs), list(walk(*xs))
        calls = {y.args[0].name for y in parts if y.is_Function}
        whole = calls & {"!", "binom"} or calls & {"floor", "ceil"} and names <= set("ijklmnNMK") or any(  # (-1)^n
            y.is_Function and "^" in calls and y.args[1].is_Rational and y.args[1].p < 0 and symbols(*y.args[2:])
            for y in parts)
        mode = "whole" if whole else "signed" if len(names) == 1 or "abs" in calls else "positive"
        real, (few, enough) = bool(names) and symbol("i") not in parts, (6, 12) if whole else (3, 4)
        marks = sorted({y.name for y in parts if y.is_Symbol} & MARKS)
        for readings in itertools.product((0, 1), repeat=len(marks)):
            agreed = 0
            for trial in range(24 if names else 1):
                point = Point(self.budget, trial, mode, real, zip(marks, readings))
                holds, why_not = attempt(lambda point: test(*map(point.value, xs)), point)
                agreed = agreed if why_not else agreed + 1 if holds else -1
                if agreed in (-1, enough):
                    break
            if agreed >= (few if names else 1):
                return True
        return False

    def same_members(self, a, b):
        """In any order, equally many; repeated members of sets and repeated points count once."""
        unique = "set" in (a.kind, b.kind) or all(kind(member) == "tuple" for member in a.parts + b.parts)
        x, y = (collections.Counter(list(dict.fromkeys(z.parts)) if unique else z.parts) for z in (a, b))
        left = list((y - x).elements())  # what is in both costs nothing
        if x.total() != y.total():
            return False
        for member in (x - y).elements():
            found = next((other for other in left if self.equal(member, other)), None)
            if found is None:
                return False
            left.remove(found)
        return True

    def values(self, relation):
        """What an equation says the value is: its sides that are no labels, if they agree; after ~ a rounded one."""
        sides, rounded = relation.parts, relation.note.endswith("~")
        labels, values = [x for x in sides if is_label(x)], [x for x in sides if not is_label(x)]
        simple = all(is_label(x, simple=True) for x in labels)
        if not set(relation.note) <= set("=~ ") or "~" in relation.note[:-1]:
            return []
        if rounded and len(values) > 1:
            v, w = (Point(self.budget).value(scalar(value)) for value in values[-2:])
            return values if abs(v - w) * 150 < abs(w) and all(map(self.equal, values[:-1], values[1:-1])) else []
        if not all(map(self.equal, values, values[1:])) or not simple and symbols(*values[-1:]):
            return []
        return values[-1:] or (sides[-1:] if simple else [])

    def same_relation(self, a, b):
        x, y = a.parts, b.parts
        if a.note != b.note or len(x) != len(y):
            return False
        if all(map(self.equal, x, y)):
            return True
        if a.note == "=" and is_label(x[0]) and is_label(y[0]) and self.equal(x[1], y[1]):
            names = {side.name.split("_")[0].lower() if is_name(side) else "" for side in (x[0], y[0])}
            return len(names - {""}) == len(names) == 1 or names == {"", "y"} or any(name[:1] == '"' for name in names)
        if len(x) != 2 or any(map(kind, x + y)) or not symbols(*x, *y):
            return False
        left, right = self.difference(a), self.difference(b)
        ratio = Point(self.budget).value(left) / Point(self.budget).value(right)
        return (a.note == "=" or engine()["mp"].re(ratio) > 0) and self.holds(
            lambda v, w: abs(v - ratio * w) * 2**100 < abs(v), left, right)

    def difference(self, relation):
        """Left side minus right side; of an equation times the denominators of its terms: xy - 1 for y = 1/x."""
        x = add([relation.parts[0], negative(relation.parts[1])], self.budget)
        factors = itertools.chain(*(term.args if term.is_Mul else [term] for term in (x.args if x.is_Add else [x])))
        bottoms = dict.fromkeys(y for y in factors if relation.note == "=" and y.is_Pow and y.exp.p < 0)
        return multiply(x, *(inverse(y, self.budget) for y in bottoms))

    def same_reals(self, a, b):
        """Are both sets of reals, and the same?  Sets are sorted lists of cuts, the places where membership changes."""
        relations = [x for x in (a, b) if kind(x) == "relation"]
        if any(x.note in ("=", "~") for x in relations) or len(relations) == 2 and unknown(a) != unknown(b):
            return False
        cuts = attempt(self.reals, a)[0]
        return cuts != [] and cuts == attempt(self.reals, b)[0]

    def cut(self, x, above):
        """(an end in units of 2**-300, does the cut lie just above it?)"""
        if kind(x) == "infinity":  # (-oo, 0] is not [-oo, 0]
            return (math.inf, above) if x.note == "+" else (-math.inf, not above)
        require(not symbols(scalar(x)), "an end that is no number")
        return int(engine()["mp"].nint(Point(self.budget, real=True).value(scalar(x)) * 2**300)), above

    def combine(self, joint, sets):
        """Union, intersection or difference of sets of reals."""
        found, outside = [], lambda inside: inside[0] and not any(inside[1:])
        belongs = {"cup": any, "or": any, "setminus": outside}.get(joint, all)
        for cut in sorted({cut for cuts in sets for cut in cuts}):
            self.budget.spend()
            if belongs([sum(other <= cut for other in cuts) % 2 for cuts in sets]) != len(found) % 2:
                found.append(cut)
        return found

    def reals(self, x):
        """The cuts of what is a set of reals."""
        if kind(x) == "set":
            return self.combine("or", [[self.cut(part, False), self.cut(part, True)] for part in x.parts])
        if kind(x) == "interval" or kind(x) == "tuple" and len(x.parts) == 2:
            ends = x.note or "()"
            cuts = [self.cut(x.parts[0], ends[0] == "("), self.cut(x.parts[1], ends[1] == "]")]
            require(cuts[0] < cuts[1], "an interval without points")
            return cuts
        if kind(x) == "relation":
            steps, name = zip(x.note.split(), x.parts, x.parts[1:]), unknown(x)
            return self.combine("and", [self.reals(right) if joint == "in" and left == name else
                                        self.half_line(joint, left, right, name) for joint, left, right in steps])
        if kind(x) in ("cup", "cap", "setminus") or kind(x) == "list" and any(
                kind(part) == "relation" and part.note != "=" for part in x.parts) and unknown(x):
            sets = [self.reals(part) for part in x.parts]
            return self.combine(x.note or x.kind, sets) or (self.combine("or", sets) if x.note == "," else [])
        require(not kind(x) and x == symbol("R"), "no set of reals")
        return EVERYTHING

    def half_line(self, joint, left, right, x):
        """What solves a relation that is linear in x, or in |u|: |u| < c is u < c and -u < c, |u| > c one of these."""
        require(x and joint in ("<", ">", "<=", ">=", "=", "!="), "no linear relation")
        left, right = scalar(left), scalar(right)
        for u in (left, right):
            if u.is_Function and u.args[0].name == "abs" and joint not in ("=", "!="):
                pairs = [(v, right) if u is left else (left, v) for v in (u.args[1], negative(u.args[1]))]
                return self.combine("and" if (joint[0] == "<") == (u is left) else "or",
                                    [self.half_line(joint, *pair, x) for pair in pairs])
        constant, rest = add([left, negative(right)], self.budget).as_independent(x, as_Add=True)
        slope = multiply(rest, inverse(x, self.budget))
        sign, closed = self.cut(slope, False)[0], joint[-1] == "="
        require(sign, "a relation without its unknown")
        bound = multiply(number(-1), constant, inverse(slope, self.budget))
        if joint in ("=", "!="):
            point = [self.cut(bound, False), self.cut(bound, True)]
            return point if joint == "=" else [EVERYTHING[0], *point, EVERYTHING[1]]
        below = (joint[0] == "<") == (sign > 0)
        return [EVERYTHING[0], self.cut(bound, closed)] if below else [self.cut(bound, not closed), EVERYTHING[1]]


# 7. Verdicts, and the public functions
PLAIN = re.compile(r"\s*([+-]?\d{1,400}(?:\.\d{1,400})?)(?:\s*/\s*0*([1-9]\d{0,400}))?\s*")
GROUPED = re.compile(r"(?<![\w.,^(\[])(?<!\\\{)\d{1,3}(?:,\d{3})+(?![\d,)\]])")
MINUS = re.compile(r"(?<=\d)[eE]-(?=\d)")
NO_WORDS = re.compile(r'\\(?:text\w*|mathrm|mbox)\s*\{([^{}]*)\}|[$"]|(?<!\w)(?:an?|the)(?!\w)')
BOX = re.compile(r"\\++(?:boxed|fbox)(?![A-Za-z])\s*+(?:(\{)|([^\s${}\\]+)|)"  # possessive: a run of backslashes is
                 r"|(?:\\\\)*+\\.|\\++|[{}]", re.DOTALL)  # read once and not again from each of its backslashes


def variants(text):
    """The lists of tokens that a text may mean: 1,234 is a number or a list, 2e-3 a number or 2e - 3."""
    text = clean(text)
    choice = re.sub(r'^\(\s*"?([a-j])\s*\)$', lambda match: match[1].upper(), text)  # (c) is a choice or a variable
    found = [GROUPED.sub(lambda match: match[0].replace(",", ""), text), text, MINUS.sub(" e-", text), choice]
    lists = [tokenize(variant) for variant in dict.fromkeys(found)]
    if definition := re.match(r"\w(?:_\{-1\})?'*\s*\(\s*([a-z])\s*\)\s*=|\w_\{?([a-z])\}?\s*=", text):
        name = re.compile("^%s$|(?<=_)%s$" % ((definition[1] or definition[2],) * 2))
        lists += [[(what, name.sub("#", value)) for what, value in tokens] for tokens in lists]  # f(x) is f(#)
    return lists


def meanings(tokens, budget):
    """The readings of tokens: one, or with +- a list for signs that agree and one for signs that each go their way."""
    places, branches = [i for i, token in enumerate(tokens) if token in (("o", "pm"), ("o", "mp"))], []
    require(len(places) <= MAX_SIGNS, "more than %d plus-minus signs" % MAX_SIGNS)
    for choice in itertools.product((("+", "-"), ("-", "+")), repeat=len(places)):
        signs = {i: ("o", sign[tokens[i][1] == "mp"]) for i, sign in zip(places, choice)}
        parser = Parser([signs.get(i, token) for i, token in enumerate(tokens)], budget)
        branches.append(parser.nested(parser.members, "the end"))
    lists = []
    for nodes in ([branches[0], branches[-1]], branches)[:len(places)]:
        members = dict.fromkeys(part for x in nodes for part in (x.parts if kind(x) in ("list", "set") else [x]))
        lists.append(Node("list", tuple(members), "or") if len(members) > 1 else nodes[0])
    return lists or branches


def attempt(function, *args):
    """(its result, "") or ([], why there is none)."""
    try:
        return function(*args), ""
    except (ArithmeticError, ValueError, RecursionError) as error:
        return [], str(error) or "refused"


def verdict(prediction, gold):
    """(equal?, why, {text: its readings})."""
    texts = sorted((prediction, gold))  # so that the verdict is symmetric
    if len(max(texts, key=len)) > MAX_CHARS:
        return False, "more than %d characters" % MAX_CHARS, {}
    found = [attempt(variants, text) for text in texts]
    first = [[value for _, value in lists[0]] if lists else [] for lists, _ in found]
    if first[0] == first[1] != []:
        return True, "the same text", {}
    budget, readings, reasons = Budget(), {}, [why for _, why in found]
    for text, (lists, _) in zip(texts, found):
        results = [attempt(meanings, tokens, budget) for tokens in lists]
        readings[text] = [node for nodes, _ in results for node in nodes]
        reasons += [why for _, why in results if not readings[text]]
    if not any(readings.values()):
        words = [re.findall(r"[^\W_]+|[^\w\s]", NO_WORDS.sub(r" \1 ", text.lower()).rstrip(". ")) for text in texts]
        return words[0] == words[1] != [], "compared as words (%s)" % " ".join(reasons), readings
    for x, y in itertools.product(*readings.values()):
        equal, why = attempt(Equality(budget).equal, x, y)
        if equal:
            return True, "equal values", readings
        reasons.append(why)
    return False, " ".join(filter(None, reasons)) or "different values", readings


def extract_answer(text, open_thought_counts=False):
    """str -> the content of its last complete \\boxed{...}, \\fbox{...} or \\boxed 5; None if missing or empty."""
    thought = text.rfind("<think>")
    if not open_thought_counts and thought > text.rfind("</think>"):
        text = text[:thought]
    answer, opened = None, []  # opened: for each open brace, where the content of its box starts
    for match in BOX.finditer(text):
        if match[1] or match[0] == "{":
            opened.append(match.end() if match[1] else None)
        elif match[2]:
            answer = match[2]
        elif match[0] == "}" and opened:
            start = opened.pop()
            answer = answer if start is None else text[start:match.start()]
    return answer and answer.strip() or None


def answers_match(prediction, gold):
    """Are two bare answers (str, no box around them) equal?  Symmetric; raises only ImportError, without sympy."""
    plain = [PLAIN.fullmatch(text) for text in (prediction, gold)]
    if not all(plain):
        return verdict(prediction, gold)[0]
    return len({Fraction(match[1]) / int(match[2] or 1) for match in plain}) == 1


def is_correct(response, gold):
    """Does the last box of a response (str) equal gold, a str or a list of which any will do?  Raises as above."""
    answer, golds = extract_answer(response), [gold] if isinstance(gold, str) else gold
    return answer is not None and any(answers_match(answer, g) for g in golds)


def explain(prediction, gold):
    """How each of two bare answers was read and why the verdict is what it is, as three lines.  Raises as above."""
    equal, why, readings = verdict(prediction, gold)
    sides = ["%s: %s" % (side, " or ".join(map(show, readings.get(text, ()))) or text[:1000])
             for side, text in (("prediction", prediction), ("gold", gold))]
    return "\n".join([*sides, "%s: %s" % ("equal" if equal else "not equal", why)])


def show(x):
    """As text: 1/3, x, Add(x, 1), Call(sin, x), interval [)(0, 1)."""
    if not kind(x) and not x.args:
        huge = x.is_Rational and x.p.bit_length() + x.q.bit_length() > 200
        return "a huge number" if huge else x.name if x.is_Symbol else "%d/%d" % (x.p, x.q) if x.q > 1 else str(x.p)
    name, parts = ((x.kind + " " + x.note).strip(), x.parts) if kind(x) else (type(x).__name__, x.args)
    return "%s(%s)" % (name, ", ".join(map(show, parts)))


def main(arguments):
    """PREDICTION GOLD, or --file ROWS.jsonl; read by hand, since an answer may well start with a minus sign."""
    if len(arguments) != 2:
        sys.exit("error: expected PREDICTION GOLD, or --file ROWS.jsonl")
    if arguments[0] != "--file":
        return print(explain(*arguments))
    verdicts = []
    try:
        for line in open(arguments[1], encoding="utf-8"):
            row = json.loads(line)
            answer = extract_answer(row["response"]) if "response" in row else row["prediction"]
            golds = [row["gold"]] if isinstance(row["gold"], str) else row["gold"]
            verdicts.append(answer is not None and any(answers_match(answer, gold) for gold in golds))
            print(json.dumps({"line": len(verdicts), "correct": verdicts[-1]}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit("error: %s, line %d: %r" % (arguments[1], len(verdicts) + 1, error))
    print("%d of %d correct" % (sum(verdicts), len(verdicts)))


if __name__ == "__main__":
    main(sys.argv[1:])
