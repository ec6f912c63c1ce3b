"""Is this final answer equal to the gold one?  One file, standard library only; copy it anywhere.

    extract_answer(text)              content of the last complete \\boxed{...} or \\fbox{...}, else None
    answers_match(prediction, gold)   are two bare answers equal?  symmetric
    is_correct(response, gold)        does the response's last box equal gold, or one of a list of golds?
    explain(prediction, gold)         how each side was read, and why the verdict is what it is

    python answer_checker.py '\\frac{1}{2}' 0.5
    python answer_checker.py --file rows.jsonl       rows with "gold" and "prediction" or "response"

Accepts LaTeX and plain-text mathematics: numbers (fractions, mixed and repeating decimals, thousands separators,
scientific notation, percent, degrees, currency, bases, units and words around a number), roots, powers, logarithms,
trigonometry, factorials, binomials, floors, absolute values, complex numbers, expressions in variables, lists and
sets (unordered), tuples and vectors (ordered), matrices, intervals, unions, inequalities and set-builder notation
(as sets of reals), equations (up to a non-zero factor), x = 5 and other labelled answers, function definitions, +-,
ratios, clock times, choice letters, short texts.

Refuses (the verdict is "not equal" unless both texts are the same): sums, integrals and limits, solving non-linear
equations, rounding (0.333 is not 1/3), and everything past the limits below.

Costs about 0.2 ms for a usual pair.  Nothing is executed and no text reaches eval or a computer algebra system.  The
text is parsed by a small grammar; numbers are exact fractions or 60-digit complex balls (a value and a bound on its
error); expressions in variables are compared at fixed pseudo-random points.  Length, nesting, digits, exponents,
branches and total work are bounded before they are computed, so there is no timeout and every thread gets the same
verdict.
"""
import decimal
import functools
import itertools
import math
import random
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

VERSION = "1.0"

MAX_CHARS = 2000  # of an answer; a longer one equals nothing
MAX_TOKENS = 800
MAX_DEPTH = 24  # nested groups
MAX_DIGITS = 1000  # of a number in the text
MAX_BITS = 40_000  # of a numerator or denominator
MAX_SIGNS = 4  # of +- in one answer, 16 branches
MAX_WORK = 60_000  # evaluation steps in one comparison, each a few microseconds


class Unreadable(ValueError):
    """The text is not in the grammar, or is past a limit."""


class Undefined(ArithmeticError):
    """The expression has no value here (or none that the limits allow to compute)."""


# Tokenizer: text -> (kind, value, space before?); kinds: n(umber), v(ariable), c(ommand), t(ext word), o(perator).

SYNONYMS = {  # commands and plain spellings -> one operator
    r"\cdot": "*", r"\times": "*", r"\ast": "*", "**": "^", r"\div": "/", r"\le": "<=", r"\leq": "<=",
    r"\leqslant": "<=", r"\leqq": "<=", r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=", r"\geqq": ">=", r"\lt": "<",
    r"\gt": ">", r"\ne": "!=", r"\neq": "!=", r"\approx": "~", r"\simeq": "~", r"\doteq": "~", "==": "=", ":=": "=",
    r"\in": "in", r"\cup": "cup", r"\cupdot": "cup", r"\bigcup": "cup", r"\cap": "cap", r"\setminus": "setminus",
    r"\backslash": "setminus", r"\pm": "pm", r"\mp": "mp", r"\mid": "|", r"\vert": "|", r"\lvert": "|",
    r"\rvert": "|", r"\|": "||", r"\Vert": "||", r"\lVert": "||", r"\rVert": "||", r"\{": "{{", r"\}": "}}",
    r"\lbrace": "{{", r"\rbrace": "}}", r"\colon": ":", r"\to": "->", r"\rightarrow": "->", r"\equiv": "equiv",
    r"\circ": "deg", r"\degree": "deg", r"\%": "%", r"\land": "and", r"\wedge": "and", r"\lor": "or", r"\vee": "or",
    r"\prime": "'", r"\langle": "<(", r"\rangle": ")>", r"\lbrack": "[", r"\rbrack": "]", r"\lparen": "(",
    r"\rparen": ")", r"\\": "newline", r"\newline": "newline", ";": ",", r"\$": "$", r"\textdegree": "deg",
    r"\slash": "/", r"\notin": "notin", r"\cr": "newline",
}
DROPPED = set(r"""\, \; \: \! \  \> \( \) \[ \] \quad \qquad \displaystyle \textstyle \scriptstyle \limits \nolimits
    \boxed \fbox \angle \measuredangle \triangle \hfill \strut \mathstrut \bf \rm \it \normalsize \large \Large
    \textnormal \mathop \thinspace \enspace \nonumber""".split()) | {"\\ "}
TEXT = set(r"\text \textbf \textit \textrm \textsf \texttt \mbox \hbox \emph \textsc \underline".split())
FONT = set(r"\mathrm \mathbf \mathit \mathsf \mathcal \mathfrak \mathbb \boldsymbol \bm \operatorname".split())
ACCENTS = set(r"\overline \vec \hat \bar \dot \ddot \tilde \widehat \overrightarrow \widetilde \overset".split())
REFUSED = set(r"\int \iint \oint \sum \prod \lim \limsup \liminf \ldots \dots \cdots \vdots \def \write \input".split())
FUNCTIONS = {f + h for f in ("sin", "cos", "tan", "cot", "sec", "csc") for h in ("", "h")} | {
    "arc" + f for f in ("sin", "cos", "tan", "cot", "sec", "csc")} | {"ln", "log", "lg", "exp", "sqrt"}
OPAQUE = {"max", "min", "gcd", "lcm", "arg", "det", "deg", "dim", "Re", "Im", "sgn", "sign", "mod", "erf", "bmod",
          "pmod", "rank", "tr", "ker"}
ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "cosec": "csc", "tg": "tan", "ctg": "cot",
           "arctg": "arctan", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh", "infinity": "infty",
           "inf": "infty", "oo": "infty", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom",
           "tbinom": "binom", "varnothing": "emptyset", "abs": "abs", "varphi": "phi", "varepsilon": "epsilon"}
UNITS = {  # unit: (dimension, size); two answers with different units of one dimension are converted
    "mm": ("m", "1/1000"), "cm": ("m", "1/100"), "m": ("m", "1"), "km": ("m", "1000"), "inch": ("ft", "1/12"),
    "in": ("ft", "1/12"), "ft": ("ft", "1"), "feet": ("ft", "1"), "foot": ("ft", "1"), "yard": ("ft", "3"),
    "mile": ("ft", "5280"), "second": ("s", "1"), "sec": ("s", "1"), "s": ("s", "1"), "minute": ("s", "60"),
    "min": ("s", "60"), "hour": ("s", "3600"), "hr": ("s", "3600"), "h": ("s", "3600"), "day": ("s", "86400"),
    "week": ("s", "604800"), "mg": ("g", "1/1000"), "g": ("g", "1"), "gram": ("g", "1"), "kg": ("g", "1000"),
    "cent": ("money", "1/100"), "dollar": ("money", "1"), "$": ("money", "1"), "usd": ("money", "1"),
    "centimeter": ("m", "1/100"), "meter": ("m", "1"), "kilometer": ("m", "1000"), "millimeter": ("m", "1/1000"),
    "kilogram": ("g", "1000"), "am": ("clock", "1"), "pm": ("clock", "2"),
}
MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMERALS = {w: n for n, w in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen twenty".split())}
NEGATIONS = set("not no except without never isn't neither nor non".split())
QUALIFIERS = set("where such given since because provided with for if when as".split())
WORDS = (set(UNITS) | {u + "s" for u in UNITS if len(u) > 2} | set(MULTIPLIERS) | set(NUMERALS) | NEGATIONS |
         QUALIFIERS | set("the is are inches mph rpm per percent degree degrees radian radians unit square cubic sq "
                          "lb lbs oz ml kcal ways all any yes no th st nd rd".split())) - {"s", "m", "h", "g", "$"}
GREEK = {"\N{GREEK SMALL LETTER FINAL SIGMA}": r"\sigma "}
UNICODE = dict(zip("−–—‐×·∙⋅÷≤≥≠≈≡∞∪∩∈∉√∛°º±∓∅∣∕⁄→′″“”‘’⟨⟩〈〉⌊⌋⌈⌉∧∨∖￥¥£€¢∘⩽⩾ℝℤℕℚℂ∠∶，；（）", (
    r"- - - - * * * * / <= >= != \approx~ \equiv~ \infty~ \cup~ \cap~ \in~ \notin~ \sqrt~ \sqrt[3] \degree~ \degree~"
    r" \pm~ \mp~ \emptyset~ | / / \to~ ' '' ~ ~ ' ' \langle~ \rangle~ \langle~ \rangle~ \lfloor~ \rfloor~ \lceil~"
    r" \rceil~ \land~ \lor~ \setminus~ $ $ $ $ ~cents \circ~ <= >= \mathbb{R} \mathbb{Z} \mathbb{N} \mathbb{Q}"
    r" \mathbb{C} \angle~ : , , ( )").split(" ")))
UNICODE = {k: v.replace("~", " ") for k, v in UNICODE.items()}
SCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", ["^" + c for c in "0123456789+-n"] + ["_" + c for c in "0123456789"]))


def clean(text):
    """One spelling for Unicode mathematics, doubled backslashes and typographic spaces."""
    out = []
    for char in text.strip(" \t\r\n"):
        if char.isascii():
            out.append(char if char >= " " else {"\f": "\\f", "\b": "\\b"}.get(char, " "))
        elif char in SCRIPTS:
            mark, digit = SCRIPTS[char]
            if out and out[-1][:2] == mark + "{":  # extend the script that the character before opened
                out[-1] = out[-1][:-1] + digit + "}"
            else:
                out.append(mark + "{" + digit + "}")
        elif char in UNICODE:
            out.append(UNICODE[char])
        else:
            name = unicodedata.name(char, "")
            plain = unicodedata.normalize("NFKC", char)
            if name.startswith(("GREEK SMALL LETTER ", "GREEK CAPITAL LETTER ")) and name.count(" ") == 3:
                letter = name.rsplit(" ", 1)[1].lower().replace("lamda", "lambda")
                out.append("\\" + (letter if "SMALL" in name else letter.capitalize()) + " ")
            elif "\N{FRACTION SLASH}" in plain:
                out.append(r"\frac{%s}{%s}" % tuple(p or "1" for p in plain.split("\N{FRACTION SLASH}")))
            elif name.startswith(("CIRCLED DIGIT", "CIRCLED NUMBER")):
                out.append("," + plain)
            elif unicodedata.category(char) not in ("Cf", "Cc"):
                out.append(plain if plain != char or char.isalpha() else " " if char.isspace() else char)
    text = "".join(out).lstrip(",")
    if r"\begin" not in text.replace(r"\\begin", ""):
        text = re.sub(r"\\\\(?=[A-Za-z{}()\[\]%$,;!|])", r"\\", text)  # JSON-escaped once too often
    text = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}", " ", text)
    text = re.sub(r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", " ", text)
    text = re.sub(r"(?<=\d)\s*(?:,\s*\\!|\{,\}|\\[,;: !]|~)\s*(?=\d{3}(?!\d))", "", text)  # 10,\!080
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ".", text)
    text = re.sub(r"(?<![\d.,\w}])\d{1,3}(?: \d{3})+(?![\d.])", lambda m: m.group().replace(" ", ""), text)
    return re.sub(r"(\d[\s~]*(?:\\text\{|\\mathrm\{|\\[ ,])?\s*)([aApP])\.?\s?[mM](?![A-Za-z^_])\.?", r"\1\\text{\2m}", text)


NUMBER = r"(?P<n>(?:\d[\dA-F]*[A-F][\dA-F]*(?=_\{?1[1-6])|\d*\.\d*\\(?:overline|bar|dot)\s*\{\d+\}|\d+(?:\.\d+)?|\.\d+)%s)"
REST = r"|(?P<c>\\[A-Za-z]+|\\.)|(?P<w>[A-Za-z]+)|(?P<o><=|>=|!=|==|:=|\*\*|->|\.\.\.|\S)"
TOKEN = re.compile(NUMBER % "" + REST)
TOKEN_SCIENTIFIC = re.compile(NUMBER % r"(?:[eE](?:-?\d+|\+\d\d+)(?!\d|\.\d))?" + REST)
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
FUNCTION_SPLIT = re.compile("|".join(sorted(FUNCTIONS, key=len, reverse=True)) + "|pi|.")


def letters(word, before, after):
    """Tokens of a run of plain letters: an operator word, a function, a word of prose or a product of variables."""
    low = word.lower()
    if low in ("and", "or"):
        return [("o", low)]
    name = ALIASES.get(word, word)
    if name in FUNCTIONS or name in OPAQUE or name in ("infty", "pi", "abs", "floor", "ceil", "alpha", "theta", "Interval"):
        return [("c", name)]
    if low == "in" and after in ("[", "(", "{", "\\"):
        return [("o", "in")]
    unit = before.isdigit() or before == "}"
    if low in WORDS and (len(word) > 2 or (word == low and unit if low in UNITS else not after or after.isalnum())):
        return [("t", low)]
    pieces = FUNCTION_SPLIT.findall(word)
    singles = sum(len(p) == 1 for p in pieces)
    if singles < len(pieces) and singles <= 3 and ("pi" not in pieces or len(word) <= 3):
        return [("c" if len(p) > 1 else "v", p) for p in pieces]
    if len(word) > 3 and after not in ("^", "_"):
        return [("t", low)]
    return [("v", c) for c in word]


def tokenize(text, scientific):
    """List of (kind, value, space before); kinds: n(umber), v(ariable), c(ommand), t(ext word), o(perator)."""
    tokens, groups, opens, end = [], [], None, 0
    for match in (TOKEN_SCIENTIFIC if scientific else TOKEN).finditer(text):
        kind, value, space = match.lastgroup, match.group(), match.start() > end
        end = match.end()
        opening, opens = opens, None
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("more than %d tokens" % MAX_TOKENS)
        if value in TEXT or value in FONT:
            opens = "text" if value in TEXT else "font"
            continue
        if value == "{":
            groups.append(opening)
            if opening:
                continue
        elif value == "}":
            if not groups:
                raise Unreadable("unbalanced }")
            if groups.pop():
                continue
        if value in DROPPED or value in ("~", "$", r"\$"):
            end = -1
            continue
        value = SYNONYMS.get(value, value)
        if kind == "n":
            tokens.append(("n", value, space))
        elif kind == "w":
            inside = "text" in groups
            if value.lower() in ("and", "or"):
                found = [("o", value.lower())]
            elif inside or (opening or (groups and groups[-1] == "font")) and len(value) > 1 and value not in FUNCTIONS | OPAQUE:
                found = [("t", value if len(value) == 1 else value.lower())]
            elif groups and groups[-1] == "font":
                unit = len(value) == 1 and value in "msghNJWVKL"
                found = [("t" if unit else "v" if len(value) == 1 else "c", value)]
            else:
                found = letters(value, text[max(0, match.start() - 9):match.start()].rstrip(" ~\\,")[-1:], text[end:end + 9].lstrip()[:1])
            tokens += [(k, v, space and i == 0) for i, (k, v) in enumerate(found)]
        elif kind == "c" and value[0] == "\\":
            name = ALIASES.get(value[1:], value[1:])
            tokens.append(("c", name, space))
        else:
            tokens.append(("o", value, space))
    if groups:
        raise Unreadable("unbalanced {")
    while tokens and tokens[-1][:2] in (("o", "."), ("o", ",")):
        tokens.pop()
    return tokens


# Parser: tokens -> nested tuples (kind, children...); a child is a node, a string or a number.

RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "~", "in", "notin", "->", "equiv"}
CLOSERS = {")", "]", "}", "}}", ")>", "|", "||", "rfloor", "rceil", "newline", "&", "end", "["}
NUMBER_SETS = {"R", "Z", "N", "Q", "C"}
INFINITY = ("const", "inf")


def num(value):
    return ("num", Fraction(value))


def walk(node):
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(c for c in node[1:] if isinstance(c, tuple))


def symbols(node):
    return {n[1] for n in walk(node) if n[0] in ("sym", "text", "app")}


def substitute(node, mapping):
    if node in mapping:
        return mapping[node]
    return tuple(substitute(c, mapping) if isinstance(c, tuple) else c for c in node)


def negative(node):
    return ("num", -node[1]) if node[0] == "num" else ("mul", num(-1), node)


class Parser:
    """Recursive descent; each method consumes tokens from position i and returns a node."""

    def __init__(self, tokens):
        self.tokens, self.i, self.depth, self.bars, self.signs = tokens, 0, 0, 0, 0

    def peek(self, ahead=0):
        j = self.i + ahead
        return self.tokens[j] if 0 <= j < len(self.tokens) else ("end", "end", False)

    def value(self, ahead=0):
        kind, value, _ = self.peek(ahead)
        return value if kind in "oc" else None

    def accept(self, *values):
        if self.value() in values:
            self.i += 1
            return self.tokens[self.i - 1][1]
        return None

    def expect(self, *values):
        found = self.accept(*values)
        if not found:
            raise Unreadable("expected %s, found %s" % (" or ".join(values), self.peek()[1]))
        return found

    def answer(self):
        while self.accept("=", ",", ":"):
            pass
        node = self.members()
        if self.peek()[0] != "end":
            raise Unreadable("unexpected %s" % self.peek()[1])
        return node

    def enclosed(self, *closers):
        """Members up to a closing token; bars inside open afresh."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested more than %d deep" % MAX_DEPTH)
        bars, self.bars = self.bars, 0
        node = self.members()
        closer = self.expect(*closers)
        self.bars = bars
        self.depth -= 1
        return node, closer

    def members(self):
        """Relations separated by commas, 'and', 'or': a list, unless there is only one."""
        items, joints = [self.relation()], set()
        while True:
            joint = self.accept(",", "and", "or", "newline")
            if not joint:
                break
            while self.value() in (",", "and", "or", "newline"):  # ", and"
                joint = self.accept(",", "and", "or", "newline")
            if self.peek()[0] == "end" or self.value() in CLOSERS:
                break
            joints.add(joint)
            items.append(self.relation())
        if len(items) > 1:  # k in Z after a solution only says what k is
            said = [x for x in items if x[0] == "rel" and x[1] == "in" and x[-1] in NUMBER_SET_NODES]
            if said and said != items:
                rest = [x for x in items if x not in said]
                node = rest[0] if len(rest) == 1 else ("list", ",", *rest)
                return ("family", node, said[0][2])
        if len(items) == 1:
            return items[0]
        return ("list", "or" if "or" in joints else "and" if "and" in joints else ",", *items)

    def relation(self):
        sides, ops = [self.set_expression()], []
        while self.value() in RELATIONS:
            ops.append(self.accept(*RELATIONS))
            sides.append(self.set_expression())
        return ("rel", " ".join(ops), *sides) if ops else sides[0]

    def set_expression(self):
        node = self.ratio()
        while self.value() in ("cup", "cap", "setminus"):
            node = (self.accept("cup", "cap", "setminus"), node, self.ratio())
        return node

    def ratio(self):
        parts = [self.sum()]
        while self.accept(":"):
            parts.append(self.sum())
        if len(parts) == 1:
            return parts[0]
        if parts[0][0] == "text":  # "Answer: 5"
            return ("rel", "=", *parts)
        unit = parts[-1][2] if parts[-1][0] == "unit" else ""  # 4:30 pm
        ratio = ("ratio", *parts[:-1], parts[-1][1] if unit else parts[-1])
        return ("unit", ratio, unit) if unit else ratio

    def sum(self):
        terms, first = [], True
        while True:
            sign = num(1)
            count = 0
            while self.value() in ("+", "-", "pm", "mp"):
                op = self.accept("+", "-", "pm", "mp")
                count += 1
                if op == "-":
                    sign = negative(sign)
                elif op != "+":
                    self.signs += 1
                    sign = ("mul", sign, ("sign", self.signs, 1 if op == "pm" else -1))
            if count > 2:
                raise Unreadable("too many signs")
            if not first and not count:
                break
            term = self.product()
            terms.append(term if sign == num(1) else negative(term) if sign == num(-1) else ("mul", sign, term))
            first = False
        return ("add", *terms) if len(terms) > 1 else terms[0]

    def starts_factor(self):
        kind, value, _ = self.peek()
        if kind in "nvct":
            return value not in ("rfloor", "rceil", "end")
        return value in ("(", "{", "{{", "<(", "|", "||") and not (value in ("|", "||") and self.bars)

    def product(self):
        start = self.i
        while self.peek()[0] == "t" or self.i > start and self.value() == ",":
            self.i += 1
        words = [t[1] for t in self.tokens[start:self.i]]
        if not (words and (self.starts_factor() or self.value() in ("-", "["))) or words[-1] in NUMERALS:
            self.i, words = start, []
        if NEGATIONS & set(words):
            raise Unreadable("words change the meaning")
        if words:
            node = self.sum()
            if node[0] in ("sym", "app") and self.value() not in RELATIONS:
                raise Unreadable("words around a symbol")
            return node
        node = self.factor()
        while True:
            kind, value, space = self.peek()
            previous = self.peek(-1)
            if value in ("*", "/") and kind == "o":
                self.i += 1
                if self.peek()[0] == "t":
                    continue  # m / s
                sign = self.accept("-", "+")
                right = self.factor()
                while value == "/" and self.peek(-1)[0] == "v" and self.peek()[0] == "v" and not self.peek()[2]:
                    right = ("mul", right, self.factor())  # t/RC
                if sign == "-":
                    right = negative(right)
                if value == "*":
                    node = scale(node, right)
                else:
                    node = scale(node, ("div", num(1), right)) if node[0] in COMPOUND else ("div", node, right)
                continue
            if value in ("pmod", "bmod", "mod") and kind == "c":
                start = self.i + 1
                self.i += 1
                self.factor()
                node = ("unit", node, "mod " + "".join(t[1] for t in self.tokens[start:self.i] if t[1] not in "{}()"))
                continue
            if kind == "t":
                node = self.units(node)
                continue
            if not self.starts_factor():
                return node
            if node[0] == "num" and node[1].denominator == 1 and previous[0] == "n" and kind in "nc":
                mixed = self.mixed(node, kind, value)
                if mixed:
                    node = self.postfix(mixed)
                    continue
            if kind == "n" and previous[0] in "nv":
                raise Unreadable("two adjacent numbers")
            right = self.factor()
            if right[0] == "div" and right[1][0] == right[2][0] == "text":  # \frac{\text{m}}{\text{s}}
                node = ("unit", node, "%s / %s" % (right[1][1], right[2][1]))
            else:
                node = scale(node, right)

    def mixed(self, whole, kind, value):
        """1 \\frac{3}{4} or 1 3/4: a proper fraction of two numerals after an integer."""
        start = self.i
        if kind == "n" and self.value(1) == "/" and self.peek(2)[0] == "n":
            top, bottom = self.peek()[1], self.peek(2)[1]
            self.i += 3
        elif value == "frac":
            self.i += 1
            node = self.command("frac")
            if node[0] != "div" or node[1][0] != "num" or node[2][0] != "num":
                self.i = start
                return None
            top, bottom = str(node[1][1]), str(node[2][1])
        else:
            return None
        if top.isdigit() and bottom.isdigit() and 0 < int(top) < int(bottom):
            return ("num", whole[1] + Fraction(int(top), int(bottom)))
        self.i = start
        return None

    def units(self, node):
        """Words after a value, with their powers and slashes: its unit.  'percent' and 'degrees' are values' marks."""
        words = []
        while True:
            kind, value, _ = self.peek()
            if kind == "t":
                words.append(value)
            elif value == "^" and words:
                self.i += 1
                exponent = self.script()
                words.append("^%s" % (exponent[1] if exponent[0] == "num" else "?"))
                continue
            elif not (kind == "o" and value in ("/", "*", ".") and self.peek(1)[0] == "t"):
                break
            self.i += 1
        if NEGATIONS & set(words):
            raise Unreadable("words change the meaning")
        for word in words:
            if word in MULTIPLIERS:
                node = scale(node, num(MULTIPLIERS[word]))
        words = [w for w in words if w not in MULTIPLIERS]
        if self.starts_factor():
            raise Unreadable("words inside a formula")
        if words and words[0] in ("degrees", "degree"):
            return ("deg", node)
        if words and words[0] == "percent":
            return ("pct", node)
        if node[0] in ("unit", "list"):
            return node
        if words and node[0] == "sym" and singular(words[0]) not in UNITS:
            raise Unreadable("words around a symbol")
        return ("unit", node, " ".join(words)) if words else node

    def factor(self):
        return self.postfix(self.atom())

    def postfix(self, node):
        while True:
            value = self.value()
            if value == "^":
                self.i += 1
                stars = self.accept("*")  # conjugate or dual: a different symbol
                if stars:
                    node = ("app", "*", node)
                    continue
                exponent = self.script()
                if exponent in (("deg",), ("prime",)):
                    node = self.degree(node) if exponent == ("deg",) else self.prime(node)
                elif exponent[0] == "text" and exponent[1] in ("th", "st", "nd", "rd"):
                    pass
                elif node[0] == "fn" and self.peek(-1)[0] == "never":
                    pass
                else:
                    node = ("pow", node, exponent)
            elif value == "deg":
                self.i += 1
                node = self.degree(node)
            elif value == "%":
                self.i += 1
                node = ("pct", node)
            elif value == "!":
                self.i += 1
                node = ("double_factorial" if self.accept("!") else "factorial", node)
                if self.value() == "!":
                    raise Unreadable("more than two factorial signs")
            elif value in ("'", "''"):
                self.i += 1
                node = self.prime(node)
            elif value == "_" and node[0] in ("matrix", "list", "abs", "tuple"):
                raise Unreadable("a subscript on a %s" % node[0])
            elif value == "_":
                self.i += 1
                node = ("app", "_", node, self.script())
            else:
                return node

    def degree(self, node):
        if self.peek()[0] in "vt" and self.peek()[1] in ("C", "F", "c", "f"):
            self.i += 1
        return ("deg", node)

    def prime(self, node):
        if node[0] == "num":  # feet, minutes or seconds of arc
            return node
        return ("sym", node[1] + "'") if node[0] == "sym" else ("app", "'", node)

    def script(self):
        """What follows ^ or _: a group, a signed number, or one atom."""
        if self.value() == "deg":
            self.i += 1
            return ("deg",)
        if self.value() in ("'", "''"):
            self.i += 1
            return ("prime",)
        if self.value() == "{":
            inner = [t[1] for t in self.tokens[self.i + 1:self.i + 4]]
            if inner[0:2] in (["deg", "}"], ["'", "}"]) or inner == ["'", "'", "}"]:
                self.i += len(inner[:inner.index("}") + 1]) + 1
                return ("deg",) if inner[0] == "deg" else ("prime",)
            for ending in ("th", "st", "nd", "rd"):
                if inner == [*ending, "}"]:
                    self.i += 4
                    return ("text", ending)
            self.i += 1
            return self.enclosed("}")[0]
        sign = self.accept("-", "+")
        node = self.atom()
        if self.value() == "^":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unreadable("nested more than %d deep" % MAX_DEPTH)
            node = self.postfix(node)
            self.depth -= 1
        if self.value() == "!":
            node = self.postfix(node)
        return negative(node) if sign == "-" else node

    def argument(self):
        """A TeX argument: a group, or one token, of which a number gives its first digit only."""
        kind, value, space = self.peek()
        if kind == "n" and len(value) > 1 and value.isdigit():
            self.tokens[self.i] = ("n", value[1:], False)
            return num(int(value[0]))
        if self.accept("{"):
            return self.enclosed("}")[0]
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested more than %d deep" % MAX_DEPTH)
        node = self.atom()
        self.depth -= 1
        return node

    def subscript(self):
        """The text of a subscript, so that x_1, x_{1} and x_{\\text{1}} are one symbol."""
        if self.accept("{"):
            depth, parts = 1, []
            while depth:
                kind, value, _ = self.peek()
                if kind == "end":
                    raise Unreadable("unbalanced {")
                depth += (value == "{") - (value == "}")
                parts.append(value)
                self.i += 1
            return "".join(p for p in parts if p not in "{}")
        kind, value, _ = self.peek()
        if kind not in "nvct":
            raise Unreadable("an empty subscript")
        self.i += 1
        return value

    def symbol(self, name):
        if self.value() == "_":
            self.i += 1
            name += "_" + self.subscript()
        while self.value() in ("'", "''"):
            name += self.accept("'", "''")
        if name in ("f", "g", "h") and [t[1] for t in self.tokens[self.i:self.i + 6]] == ["^", "{", "-", "1", "}", "("]:
            self.i += 5
            name += "^-1"
        if self.value() == "(" and self.applies(name):
            self.i += 1
            inner, _ = self.enclosed(")")
            return ("app", name, *(inner[2:] if inner[0] == "list" else (inner,)))
        if name == "e":
            return ("const", "e")
        return ("const", "i") if name == "i" else ("sym", name)

    def applies(self, name):
        """Is name( the start of a function application?  Else it is a product: n(n+1)."""
        if name.rstrip("'^-1") in ("f", "g", "h", "F", "G", "H", "Interval"):
            return True
        j, depth, comma = self.i + 1, 1, False
        while depth and j < len(self.tokens) and j < self.i + 12:
            value = self.tokens[j][1]
            depth += (value in "([") - (value in ")]") if self.tokens[j][0] == "o" else 0
            comma = comma or (depth == 1 and value == ",")
            j += 1
        if depth:
            return False
        inside = self.tokens[self.i + 1:j - 1]
        after = self.tokens[j][1] if j < len(self.tokens) else ""
        return comma or len(inside) == 1 and (inside[0][0] == "n" or after == "=")

    def atom(self):
        kind, value, _ = self.peek()
        self.i += 1
        if kind == "n":
            return self.number(value)
        if kind == "v":
            return self.symbol(value)
        if kind == "t":
            words = [value]
            while self.peek()[0] == "t":
                words.append(self.peek()[1])
                self.i += 1
            if len(words) == 1 and value in NUMERALS:
                return num(NUMERALS[value])
            return ("text", " ".join(words))
        if kind == "c":
            return self.command(value)
        if value in ("(", "["):
            node, closer = self.enclosed(")", "]")
            return bracket(node, value, closer)
        if value == "]":  # ]0,1[
            node, closer = self.enclosed("[", "]")
            return bracket(node, "(", ")" if closer == "[" else "]")
        if value == "<(":
            node, _ = self.enclosed(")>")
            return ("tuple", *node[2:]) if node[0] == "list" else ("tuple", node)
        if value == "{":
            node, _ = self.enclosed("}")
            return ("set", *node[2:]) if node[0] == "list" else node
        if value == "{{":
            return self.braces()
        if value in ("|", "||"):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unreadable("nested more than %d deep" % MAX_DEPTH)
            self.bars += 1
            node = self.sum()
            self.expect(value)
            self.bars -= 1
            self.depth -= 1
            return ("abs", node)
        raise Unreadable("unexpected %s" % value)

    def braces(self):
        """A set, or set-builder notation: { x [in S] | conditions }."""
        if self.accept("}}"):
            return ("set",)
        j, depth = self.i, 0
        while j < len(self.tokens) and depth >= 0 and self.tokens[j][1] not in ("|", ":"):
            depth += (self.tokens[j][1] in ("{{", "(", "[")) - (self.tokens[j][1] in ("}}", ")", "]"))
            j += 1
        builder = depth == 0 and j < len(self.tokens) and (j == self.i + 1 or self.peek(1)[1] == "in")
        if builder and self.peek()[0] in "vc":
            bars, self.bars = self.bars, 1  # the bar closes the head
            self.sum()
            if self.accept("in"):
                self.sum()
            self.bars = bars
            self.expect("|", ":")
            node, _ = self.enclosed("}}")
            return node if node[0] in ("rel", "list") else ("app", "builder", node)
        node, _ = self.enclosed("}}")
        return ("set", *node[2:]) if node[0] == "list" else ("set", node)

    def number(self, text):
        if len(text) > MAX_DIGITS:
            raise Unreadable("a number of more than %d digits" % MAX_DIGITS)
        if "\\" in text:  # 0.1\overline{6}
            whole, digits, repeat = re.match(r"(\d*)\.(\d*)\\\w+\s*\{(\d+)\}", text).groups()
            period = Fraction(int(repeat), 10**len(repeat) - 1) / 10**len(digits)
            return num(Fraction((whole or "0") + "." + (digits or "0")) + period)
        if self.value() == "_":
            self.i += 1
            base = self.subscript()
            base = str(NUMERALS.get(base, base))
            if not (base.isdigit() and len(base) < 3 and 2 <= int(base) <= 36 and text.isalnum()):
                raise Unreadable("%s is not a base" % base)
            try:
                return ("base", num(int(text, int(base))), text)
            except ValueError as error:
                raise Unreadable("%s is not a number in base %s" % (text, base)) from error
        mantissa, _, exponent = text.lower().partition("e")
        if not text.replace(".", "").isdigit() and not exponent or len(exponent) > 4:
            raise Unreadable("%s is not a number" % text)
        return num(Fraction(mantissa) * Fraction(10)**int(exponent or 0))

    def command(self, name):
        if "\\" + name in REFUSED or not name.isalpha():
            raise Unreadable("\\%s is not supported" % name)
        if name == "frac":
            top = self.argument()
            return ("div", top, self.argument())
        if name == "binom":
            top = self.argument()
            return ("binom", top, self.argument())
        if name == "sqrt":
            degree = num(2)
            if self.accept("["):
                degree, _ = self.enclosed("]")
            if self.accept("("):
                return ("root", self.enclosed(")")[0], degree)
            if self.peek()[0] == "n":
                return ("root", self.atom(), degree)
            return ("root", self.argument(), degree)
        if name in FUNCTIONS or name in OPAQUE or name in ("abs", "floor", "ceil"):
            return self.function(name)
        if name in ("lfloor", "lceil"):
            node, closer = self.enclosed("rfloor", "rceil")
            return ("floor" if name == "lfloor" else "ceil", node)
        if name == "Interval":
            self.expect("(")
            node, _ = self.enclosed(")")
            return bracket(node, "[", "]")
        if "\\" + name in ACCENTS:
            start = self.i
            inner = self.argument()
            text = "".join(str(t[1]) for t in self.tokens[start:self.i] if t[1] not in ("{", "}"))
            if name in ("vec", "overrightarrow") or inner[0] == "num":
                return inner
            return self.symbol("%s(%s)" % (name, text))
        if name == "begin":
            return self.environment()
        if name in ("infty", "pi"):
            return INFINITY if name == "infty" else ("const", "pi") if self.value() != "_" else self.symbol("pi")
        if name == "emptyset":
            return ("set",)
        if name in ("end", "rfloor", "rceil", "forall", "exists", "implies", "Rightarrow", "iff"):
            raise Unreadable("unexpected \\%s" % name)
        return self.symbol(name)

    def function(self, name):
        power = base = None
        while self.value() in ("^", "_"):
            if self.accept("^"):
                power = self.script()
            else:
                self.i += 1
                base = self.script()
        if power == num(-1) and "arc" + name in FUNCTIONS:
            name, power = "arc" + name, None
        if self.value() in ("(", "{", "{{") or self.value() == "[" and self.peek(1)[0] != "end":
            opener = self.value()
            self.i += 1
            inner, _ = self.enclosed({"(": ")", "{": "}", "{{": "}}", "[": "]"}[opener])
            if opener in "({" and self.value() == "^" and power is None and opener == "(":
                pass  # sin(x)^2 is (sin(x))^2: the caller's postfix takes it
        else:
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unreadable("nested more than %d deep" % MAX_DEPTH)
            sign = self.accept("-")
            inner = self.factor()
            while (self.starts_factor() and self.peek()[0] != "t" and self.value() not in ("(", "{{", "|", "||", "<(")
                   and self.value() not in FUNCTIONS | OPAQUE):
                inner = ("mul", inner, self.factor())
            inner = negative(inner) if sign else inner
            self.depth -= 1
        if name in OPAQUE:
            args = inner[2:] if inner[0] == "list" else inner[1:] if inner[0] in ("set", "tuple") else (inner,)
            node = ("app", name, *args)
        elif name in ("abs", "floor", "ceil"):
            node = (name, inner)
        elif name == "sqrt":
            node = ("root", inner, num(2))
        elif name == "exp":
            node = ("pow", ("const", "e"), inner)
        elif name in ("log", "ln", "lg"):
            base = base or (("const", "e") if name == "ln" else num(10) if name == "lg" else ("const", "log"))
            node = ("log", inner, base)
        else:
            node = ("fn", name, inner)
        if base and name not in ("log", "ln", "lg"):
            raise Unreadable("a subscript on %s" % name)
        return ("pow", node, power) if power else node

    def environment(self):
        """\\begin{pmatrix} and the like: a matrix; cases and aligned lines: a list."""
        name = self.subscript().strip("*")
        if self.value() == "{" or self.value() == "[":  # column specification of an array
            close = {"{": "}", "[": "]"}[self.value()]
            while self.value() not in (close, "end", None) or self.peek()[0] in "vo" and self.value() != close:
                if self.peek()[0] == "end":
                    raise Unreadable("unbalanced environment")
                self.i += 1
            self.i += 1
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested more than %d deep" % MAX_DEPTH)
        bars, self.bars = self.bars, 0
        rows, row = [], []
        while True:
            if name.endswith("matrix") or name in ("array", "cases", "aligned", "align", "gathered", "split"):
                if self.value() in ("&", "newline") and not row and self.value() == "newline":
                    self.i += 1
                    continue
                if self.value() != "end" or self.peek()[0] == "end":
                    while self.peek()[0] == "t" and self.peek()[1] in QUALIFIERS:
                        self.i += 1
                    row.append(self.relation() if self.value() != "&" else ("text", ""))
                    self.accept(",")
                if self.accept("&"):
                    continue
            else:
                raise Unreadable("\\begin{%s} is not supported" % name)
            if row:
                rows.append(("row", *row))
                row = []
            if self.accept("newline"):
                continue
            self.expect("end")
            break
        if self.subscript().strip("*") != name:
            raise Unreadable("unbalanced environment")
        self.bars = bars
        self.depth -= 1
        if name in ("vmatrix", "Vmatrix"):
            raise Unreadable("determinants are not supported")
        if all(len(r) == 2 for r in rows) and not name.endswith("matrix") and (
                name != "array" or any(r[1][0] == "rel" for r in rows)):
            rows = [r[1] for r in rows]
            return rows[0] if len(rows) == 1 else ("list", ",", *rows)
        return ("matrix" if name.endswith("matrix") or name == "array" else "set", *rows)


NUMBER_SET_NODES = {("sym", s) for s in NUMBER_SETS}


def bracket(node, opener, closer):
    """( ... ): a group or a tuple; with square brackets and two members, an interval."""
    if node[0] != "list":
        return node if opener == "(" and closer == ")" else ("tuple", node)
    items = node[2:]
    if opener + closer == "()" or len(items) != 2:
        return ("tuple", *items)
    return ("interval", *items, opener + closer)


COMPOUND = {"matrix", "tuple", "row", "rel", "list", "set", "interval", "family", "cup", "cap", "setminus"}


def scale(left, right):
    """A product; a number times a matrix or a tuple goes into its entries."""
    if left[0] in COMPOUND and right[0] in COMPOUND:
        raise Unreadable("a product of a %s and a %s" % (left[0], right[0]))
    for a, b in ((left, right), (right, left)):
        if b[0] in ("matrix", "tuple", "row"):
            return (b[0], *(scale(a, c) for c in b[1:]))
        if b[0] in COMPOUND:
            raise Unreadable("a product with a %s" % b[0])
    return ("mul", left, right)


# Values: exact fractions where possible, else complex balls: a centre of 60 digits and a bound on its error.

CONTEXT = decimal.Context(prec=60, Emin=-10**6, Emax=10**6, capitals=1, clamp=0, traps=[
    decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow])
EPS = Decimal("1e-58")
ZERO, ONE, TWO = Decimal(0), Decimal(1), Decimal(2)
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798")


class Ball:
    __slots__ = ("re", "im", "err")

    def __init__(self, re, im=ZERO, err=ZERO):
        self.re, self.im, self.err = re, im, err

    def size(self):
        return max(abs(self.re), abs(self.im))

    def real(self):
        return abs(self.im) <= self.err


def ball(x):
    if isinstance(x, Ball):
        return x
    re = Decimal(x.numerator) / Decimal(x.denominator)
    return Ball(re, ZERO, abs(re) * EPS)


def exact(x):
    if x.numerator.bit_length() > MAX_BITS or x.denominator.bit_length() > MAX_BITS:
        raise Undefined("a number of more than %d bits" % MAX_BITS)
    return x


def add(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return exact(a + b)
    a, b = ball(a), ball(b)
    return Ball(a.re + b.re, a.im + b.im, a.err + b.err + EPS * (a.size() + b.size()))


def mul(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return exact(a * b)
    a, b = ball(a), ball(b)
    err = 2 * (a.size() * b.err + b.size() * a.err + a.err * b.err + EPS * a.size() * b.size())
    if not a.im and not b.im:
        return Ball(a.re * b.re, ZERO, err)
    return Ball(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re, err)


def inverse(a):
    if isinstance(a, Fraction):
        if not a:
            raise Undefined("division by zero")
        return 1 / a
    if a.size() <= 4 * a.err:
        raise Undefined("division by zero")
    square = a.re * a.re + a.im * a.im
    return Ball(a.re / square, -a.im / square, 2 * (a.err / square + EPS / a.size()))


def exp(a):
    a = ball(a)
    size = a.re.exp()
    err = 4 * size * (a.err + EPS * (1 + a.size()))
    if not a.im:
        return Ball(size, ZERO, err)
    sine, cosine = sine_cosine(a.im)
    return Ball(size * cosine, size * sine, err)


def log(a):
    a = ball(a)
    if a.size() <= 4 * a.err:
        raise Undefined("the logarithm of zero")
    if not a.im and a.re > 0:
        re, im = a.re.ln(), ZERO
    else:
        re, im = (a.re * a.re + a.im * a.im).ln() / 2, angle(a)
    return Ball(re, im, 2 * a.err / a.size() + EPS * (1 + abs(re)))


def sine_cosine(x):
    """Taylor series after reduction to [-pi, pi]."""
    if abs(x) > 10**15:
        raise Undefined("the sine of a huge number")
    x = (x - (x / (2 * PI)).to_integral_value() * 2 * PI) / 8
    sine, cosine, term, n, square = x, ONE, x, 1, x * x
    power = ONE
    while abs(power) > Decimal("1e-66"):
        power = -power * square / ((2 * n - 1) * (2 * n))
        term = -term * square / ((2 * n) * (2 * n + 1))
        cosine += power
        sine += term
        n += 1
    for _ in range(3):
        sine, cosine = 2 * sine * cosine, 1 - 2 * sine * sine
    return sine, cosine


def arctan(x):
    for _ in range(4):
        x = x / (1 + (1 + x * x).sqrt())
    total, term, square, n = x, x, x * x, 1
    while abs(term) > Decimal("1e-66"):
        term = -term * square
        n += 2
        total += term / n
    return 16 * total


def angle(a):
    if abs(a.im) <= a.err and abs(a.im) < abs(a.re) * EPS * 10**20:
        return ZERO if a.re > 0 else PI + 0
    if abs(a.re) >= abs(a.im):
        turn = arctan(a.im / a.re)
        return turn if a.re > 0 else turn + PI if a.im > 0 else turn - PI
    return (PI / 2 if a.im > 0 else -PI / 2) - arctan(a.re / a.im)


def integer(a):
    """The integer that a number is, or None."""
    if isinstance(a, Fraction):
        return a.numerator if a.denominator == 1 else None
    nearest = a.re.to_integral_value()
    return int(nearest) if a.real() and abs(a.re - nearest) <= a.err < Decimal("1e-20") and abs(nearest) < 10**20 else None


def positive(a):
    return a > 0 if isinstance(a, Fraction) else a.real() and a.re > a.err


def exact_root(x, q):
    """The integer q-th root of an integer x >= 0, or None."""
    if q == 2:
        root = math.isqrt(x)
    elif x.bit_length() < 900:
        root = round(x ** (1 / q))
    else:
        return None
    return root if root**q == x else None


def power(a, b, real):
    """a ** b; with real, undefined where it is not real.  Odd roots of negative numbers are the real ones."""
    n = integer(b) if isinstance(b, Fraction) else None
    if n is not None:
        if isinstance(a, Fraction):
            bits = max(a.numerator.bit_length(), a.denominator.bit_length())
            if bits > 1 and bits * abs(n) > MAX_BITS:
                raise Undefined("a power of more than %d bits" % MAX_BITS)
            return a**(n if bits > 1 else n % 2 if n >= 0 else -(n % 2) or -2) if a or n > 0 else inverse(a) if n else Fraction(1)
        if abs(n) <= 1000:
            result, base = Fraction(1), a if n >= 0 else inverse(a)
            for bit in bin(abs(n))[2:]:
                result = mul(result, result)
                if bit == "1":
                    result = mul(result, base)
            return result
    if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator < 1000:
        if not a:
            if b > 0:
                return a
            raise Undefined("division by zero")
        top, bottom = exact_root(abs(a.numerator), b.denominator), exact_root(a.denominator, b.denominator)
        if top and bottom:
            root = power(Fraction(top, bottom), Fraction(b.numerator), real)
        elif a > 0:
            return exp(mul(b, log(a)))
        else:
            root = exp(mul(b, log(-a)))
        if a > 0:
            return root
        if b.denominator % 2:
            return root if b.numerator % 2 == 0 else mul(Fraction(-1), root)
        if real:
            raise Undefined("an even root of a negative number")
        if b.denominator == 2:  # i to the power of the numerator
            return mul(root, Ball(ZERO, ONE) if b.numerator % 4 == 1 else Ball(ZERO, -ONE))
    a, b = ball(a), ball(b)
    if positive(a) or not real and a.size() > 4 * a.err:
        return exp(mul(b, log(a)))
    if b == Fraction(1, 2) or a.size() <= 4 * a.err and positive(b) and b.re <= 1 and a.err < Decimal("1e-40"):
        return Ball(ZERO, ZERO, (8 * a.err)**b.re + EPS)
    if a.real() and a.re < -a.err and b.real():  # an odd root of a negative surd
        for q in (3, 5, 7):
            p = integer(mul(b, Fraction(q)))
            if p is not None:
                root = exp(mul(b, log(mul(Fraction(-1), a))))
                return root if p % 2 == 0 else mul(Fraction(-1), root)
    raise Undefined("a power of a negative number or of zero")


def trigonometric(name, a, real):
    a = ball(a)
    if name.startswith("arc") and a.real():
        x = a.re
        if name in ("arcsec", "arccsc", "arccot"):
            if abs(x) <= 4 * a.err:
                raise Undefined("division by zero")
            return trigonometric({"arcsec": "arccos", "arccsc": "arcsin", "arccot": "arctan"}[name], inverse(a), real)
        if name == "arctan":
            return Ball(arctan(x), ZERO, a.err + EPS)
        if abs(x) > 1 + a.err:
            raise Undefined("outside the domain of %s" % name)
        rest = 1 - x * x
        if rest <= 4 * a.err + EPS:  # the end of the domain
            value, err = (PI / 2).copy_sign(x), (8 * (a.err + EPS)).sqrt()
        else:
            root = rest.sqrt()
            value, err = arctan(x / root), 2 * (a.err + EPS) / root + EPS
        return Ball(value if name == "arcsin" else PI / 2 - value, ZERO, err)
    if name.startswith("a"):
        raise Undefined("%s of a complex number" % name)
    if name[-1] == "h":
        up = exp(a)
        down = inverse(up)
        sine = mul(add(up, mul(Fraction(-1), down)), Fraction(1, 2))
        cosine = mul(add(up, down), Fraction(1, 2))
        name = name[:-1]
    elif a.im:
        up = exp(mul(a, Ball(ZERO, ONE)))
        down = inverse(up)
        sine = mul(add(up, mul(Fraction(-1), down)), Ball(ZERO, Decimal("-0.5")))
        cosine = mul(add(up, down), Fraction(1, 2))
    else:
        err = a.err + EPS * (10 + abs(a.re))
        sine, cosine = (Ball(v, ZERO, err) for v in sine_cosine(a.re))
    if name in ("sin", "cos"):
        return sine if name == "sin" else cosine
    if name in ("tan", "sec"):
        return mul(sine if name == "tan" else Fraction(1), inverse(cosine))
    return mul(cosine if name == "cot" else Fraction(1), inverse(sine))


@functools.lru_cache(maxsize=4096)
def sample(name, attempt, mode):
    """The value of a symbol at the attempt-th point; mode: integer, positive or signed."""
    rng = random.Random("%s %d %s" % (name, attempt, mode))
    if mode == "integer":
        return Fraction(rng.randint(1, (5, 12, 30)[attempt % 3]))
    low, high = ((1, 90), (100, 400), (300, 1200))[attempt % 3]
    value = Fraction(rng.randint(low, high), 97)
    return -value if mode == "signed" and attempt % 4 in (1, 2) else value


class Comparison:
    """One comparison: the work it may still do, and how marks are read."""

    def __init__(self):
        self.work = MAX_WORK
        self.attempt = self.mode = None
        self.real = False
        self.degree, self.percent, self.log_base = Fraction(1), Fraction(1), ("const", "e")

    def evaluate(self, node):
        """The Fraction or Ball that a node is at the current point; Undefined if it has no value there."""
        kind = node[0]
        self.work -= 1
        if self.work < 0:
            raise Undefined("more than %d steps of work" % MAX_WORK)
        if kind == "num":
            return node[1]
        if kind in ("sym", "text"):
            if self.attempt is None:
                raise Undefined("%s has no value" % node[1])
            return sample(node[1], self.attempt, self.mode)
        if kind == "const":
            if node[1] == "pi":
                return Ball(+PI, ZERO, EPS * 10)
            if node[1] == "e":
                return exp(Fraction(1))
            if node[1] == "i":
                return Ball(ZERO, ONE)
            if node[1] == "log":
                return self.evaluate(self.log_base)
            raise Undefined("infinity is not a number")
        if kind == "unit":
            return self.evaluate(node[1])
        if kind == "base":
            return self.evaluate(node[1])
        if kind == "sign":
            raise Undefined("an open sign")
        if kind == "fn":
            degree, self.degree = self.degree, ("pi",)
            try:
                value = self.evaluate(node[2])
            finally:
                self.degree = degree
            self.work -= 40
            return trigonometric(node[1], value, self.real)
        if kind == "app":
            return self.opaque(node)
        values = [self.evaluate(c) for c in node[1:]]
        bits = 0
        for v in values:
            self.work -= v.numerator.bit_length() // 400 + v.denominator.bit_length() // 400 if isinstance(v, Fraction) else 2
        a = values[0] if values else None
        if kind == "add":
            return functools.reduce(add, values)
        if kind == "mul":
            return functools.reduce(mul, values)
        if kind in ("div", "ratio") and len(values) == 2:
            return mul(a, inverse(values[1]))
        if kind == "pow":
            self.work -= 30
            if node[1] == ("const", "e"):
                return exp(values[1])
            return power(a, values[1], self.real)
        if kind == "root":
            self.work -= 30
            return power(a, inverse(values[1]), self.real)
        if kind == "log":
            self.work -= 60
            if self.real and not positive(a):
                raise Undefined("the logarithm of a negative number")
            return log(a) if node[2] == ("const", "e") else mul(log(a), inverse(log(values[1])))
        if kind == "abs":
            if isinstance(a, Fraction):
                return abs(a)
            return Ball((a.re * a.re + a.im * a.im).sqrt() if a.im else abs(a.re), ZERO, 2 * a.err + EPS * a.size())
        if kind in ("floor", "ceil"):
            if isinstance(a, Fraction):
                return Fraction(math.floor(a) if kind == "floor" else math.ceil(a))
            whole = integer(a)
            if whole is None:
                if not a.real() or abs(a.re) > 10**40:
                    raise Undefined("the floor of that number")
                whole = int(a.re.to_integral_value(decimal.ROUND_FLOOR if kind == "floor" else decimal.ROUND_CEILING))
            return Fraction(whole)
        if kind == "deg":
            return mul(a, self.degree) if isinstance(self.degree, Fraction) else mul(a, Ball(PI / 180, ZERO, EPS))
        if kind == "pct":
            return mul(a, self.percent)
        if kind in ("factorial", "double_factorial", "binom"):
            n, k = integer(a), integer(values[-1])
            if n is None or k is None or n < 0 or k < 0:
                raise Undefined("a factorial of something other than a natural number")
            if n > 3000:
                raise Undefined("a factorial past 3000")
            self.work -= n
            if kind == "binom":
                return Fraction(math.comb(n, k))
            return Fraction(math.factorial(n) if kind == "factorial" else math.prod(range(n, 0, -2)))
        raise Undefined("%s is not a number" % kind)

    def opaque(self, node):
        """A function nobody defined: some value that depends on its name and arguments alone."""
        args = [self.evaluate(c) if isinstance(c, tuple) else c for c in node[2:]]
        if node[1] in ("max", "min") and args and all(isinstance(a, Fraction) for a in args):
            return max(args) if node[1] == "max" else min(args)
        if node[1] in ("gcd", "lcm") and args and all(isinstance(a, Fraction) and a.denominator == 1 for a in args):
            return Fraction((math.gcd if node[1] == "gcd" else math.lcm)(*(a.numerator for a in args)))
        if node[1] == "C" and len(args) == 2 and all(isinstance(a, Fraction) for a in args):
            return self.evaluate(("binom", *map(num, args)))
        if self.attempt is None:
            raise Undefined("%s has no value" % node[1])
        rounded = [str(a) if isinstance(a, (Fraction, str)) else "%.30e %.30e" % (a.re, a.im) for a in args]
        if sum(map(len, rounded)) > 2000:
            raise Undefined("huge arguments")
        return sample("%s(%s)" % (node[1], ",".join(rounded)), self.attempt, self.mode)

    # Comparison: by type, symmetric.

    def same_number(self, a, b):
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b
        a, b = ball(a), ball(b)
        err = a.err + b.err
        gap = max(abs(a.re - b.re), abs(a.im - b.im))
        return gap <= 4 * err + EPS * (a.size() + b.size()) and err <= Decimal("1e-30") * max(a.size(), b.size(), Decimal("1e-5"))

    def modes(self, *nodes):
        """The readings of degree, percent and log signs, applied to both sides alike."""
        kinds = {n[0] for node in nodes for n in walk(node)}
        bare_log = any(n == ("const", "log") for node in nodes for n in walk(node))
        for self.degree in [Fraction(1), ("pi",)] if "deg" in kinds else [Fraction(1)]:
            for self.percent in [Fraction(1), Fraction(1, 100)] if "pct" in kinds else [Fraction(1)]:
                for self.log_base in [("const", "e"), num(10)] if bare_log else [("const", "e")]:
                    yield

    def same_expression(self, a, b):
        if a == b:
            return True
        if infinite(a) or infinite(b):
            return infinite(a) == infinite(b)
        return any(self.agree(a, b, lambda x, y: self.same_number(x, y)) for _ in self.modes(a, b))

    def at_points(self, nodes):
        """Values of the nodes at sample points (None where undefined); once if there are no symbols."""
        everything = [n for node in nodes for n in walk(node)]
        names = set().union(*(symbols(node) for node in nodes))
        kinds = {n[0] for n in everything}
        self.real = bool(names) and ("const", "i") not in everything
        whole = kinds & {"factorial", "double_factorial", "binom", "floor", "ceil"} or any(
            n[0] == "pow" and n[1][0] == "num" and n[1][1] < 0 and symbols(n[2]) for n in everything)
        self.mode = "integer" if whole else "signed" if len(names) == 1 or "abs" in kinds else "positive"
        for attempt in range(24) if names else [None]:
            self.attempt = attempt
            values = []
            for node in nodes:
                try:
                    values.append(self.evaluate(node))
                except ArithmeticError:
                    if self.work < 0:
                        raise
                    values.append(None)
            yield values
        self.attempt = None

    def agree(self, a, b, same):
        points = 0
        for x, y in self.at_points([a, b]):
            if (x is None) != (y is None):
                return False
            if x is not None:
                if not same(x, y):
                    return False
                points += 1
                if points == 6:
                    break
        constant = not (symbols(a) | symbols(b))
        return points >= (1 if constant else 3)

    def proportional(self, a, b, keep_sign=False):
        """Is a - b of one equation a non-zero (or positive) multiple of the other's?"""
        factors = []
        for _ in self.modes(a, b):
            factors = []
            for x, y in self.at_points([a, b]):
                if x is None or y is None:
                    if (x is None) != (y is None):
                        return False
                    continue
                try:
                    factors.append(mul(x, inverse(y)))
                    inverse(x)
                except ArithmeticError:
                    return False
                if not self.same_number(factors[0], factors[-1]) or keep_sign and not positive(factors[-1]):
                    return False
                if len(factors) == 6:
                    break
            return len(factors) >= 3
        return False

    def equal(self, a, b):
        if a == b:
            return True
        if "family" in (a[0], b[0]):
            if a[0] == b[0]:
                a, b = (("family", substitute(n[1], {n[2]: ("sym", "#")}), n[2]) for n in (a, b))
            return self.equal(*(n[1] if n[0] == "family" else n for n in (a, b)))
        a, b = self.settle(a), self.settle(b)
        if a == b:
            return True
        if has_sign(a) or has_sign(b):
            return any(self.equal(x, y) for x, y in itertools.product(branches(a), branches(b)))
        if "unit" in (a[0], b[0]):
            return self.same_quantity(a, b)
        for x, y in ((a, b), (b, a)):
            if x[0] == "rel" and set(x[1].split()) <= {"=", "~", "equiv"} and not (y[0] == "rel" and "~" not in x[1]):
                values = readings(x)
                if any(self.consistent(x) and self.equal(v, y) for v in values):
                    return True
                if y[0] != "rel" and not (y[0] in ("list", "tuple") and x[1] == "= ="):
                    return False
            if x[0] == "rel" and x[1] == "in" and y[0] != "rel":
                return self.equal(x[3], y)
        if a[0] == b[0] == "rel":
            return self.same_relation(a, b)
        sets = [self.real_set(n) for n in (a, b)]
        if sets[0] is not None and sets[1] is not None and (a[0], b[0]) != ("tuple", "tuple"):
            return self.same_set(*sets)
        if "interval" in (a[0], b[0]):
            return self.same_interval(a, b)
        if a[0] in ("list", "set") and b[0] in ("list", "set"):
            return self.same_members(a, b)
        a, b = (("tuple", *n[2:]) if n[0] == "app" and m[0] == "tuple" and n[1].isupper() else n for n, m in ((a, b), (b, a)))
        kinds = {a[0], b[0]}
        if kinds & {"tuple", "row"} and kinds <= {"tuple", "row", "list", "matrix"}:
            x, y = entries(a), entries(b)
            return x is not None and y is not None and len(x) == len(y) and all(map(self.equal, x, y))
        if a[0] == b[0] == "matrix":
            return len(a) == len(b) and all(map(self.equal, a[1:], b[1:]))
        if kinds & {"cup", "cap", "setminus"}:
            return a[0] == b[0] and all(map(self.equal, a[1:], b[1:]))
        for x, y in ((a, b), (b, a)):
            if x[0] in ("set", "list") and len(x) == 2 + (x[0] == "list"):
                return self.equal(x[-1], y)
        if kinds & {"list", "set", "tuple", "matrix", "row", "rel"}:
            return False
        if a[0] == b[0] == "ratio" and len(a) == len(b) > 3:
            return all(self.same_expression(("div", x, a[1]), ("div", y, b[1])) for x, y in zip(a[2:], b[2:]))
        if a[0] == "base" or b[0] == "base":
            x, y = (a, b) if a[0] == "base" else (b, a)
            return self.same_expression(a, b) if y[0] == "base" else y[0] == "num" and str(y[1]) == x[2]
        if a[0] == b[0] == "text":
            return a[1] == b[1]
        return self.same_expression(a, b)

    def settle(self, node):
        """Inequalities that stand in a list are one set; a set of one relation is that relation."""
        if node[0] == "list" and all(n[0] == "rel" and n[1] not in ("=", "~") for n in node[2:]):
            if len(set().union(*(symbols(n) for n in node[2:]))) == 1:
                return ("condition", node[1], *node[2:])
        return node

    def same_quantity(self, a, b):
        units = [measure(n[2]) if n[0] == "unit" else None for n in (a, b)]
        if a[0] == b[0] == "unit" and a[2] != b[2] and a[2][:4] == b[2][:4] == "mod ":
            return False
        if all(units) and units[0][0] == units[1][0] and units[0] != units[1]:
            if units[0][0] == "clock^1":
                return False
            return self.equal(*(scale(num(u[1]), n[1]) for u, n in zip(units, (a, b))))
        if a[0] != "unit" and b[0] == "unit":
            a, b = b, a
        return self.equal(a[1], b[1] if b[0] == "unit" else b)

    def consistent(self, rel):
        """Do all sides of a chain that are not labels agree?  5 = 7 is no answer."""
        values = [s for s in rel[2:] if not label(s)]
        for x, y in zip(values, values[1:]):
            if rel[1].split()[-1] == "~":
                try:
                    u, v = ball(self.evaluate(x)), ball(self.evaluate(y))
                except ArithmeticError:
                    return False
                if abs(u.re - v.re) > abs(u.re) / 100:
                    return False
            elif not self.equal(x, y):
                return False
        return True

    def same_relation(self, a, b):
        (ops_a, *x), (ops_b, *y) = a[1:], b[1:]
        if set(ops_a.split()) <= {">", ">="}:
            ops_a, x = flip(ops_a), x[::-1]
        if set(ops_b.split()) <= {">", ">="}:
            ops_b, y = flip(ops_b), y[::-1]
        if ops_a == ops_b and len(x) == len(y) and all(map(self.equal, x, y)):
            return True
        if "=" in (ops_a, ops_b) and set((ops_a + " " + ops_b).split()) <= {"=", "~"}:
            if ops_a == ops_b and self.same_definition(x, y):
                return True
            if ops_a == ops_b == "=" and numeric(x) and numeric(y) and self.proportional(difference(x), difference(y)):
                return True
            u, v = readings(a), readings(b)
            return bool(u and v and ops_a != ops_b and self.equal(u[0], v[0]) and label(x[0]) and x[0] == y[0])
        sets = self.real_set(a), self.real_set(b)
        if None not in sets and symbols(a) == symbols(b):
            return self.same_set(*sets)
        if ops_a == ops_b and len(x) == 2 and numeric(x) and numeric(y):
            return self.proportional(difference(x), difference(y), keep_sign=ops_a in ("<", "<="))
        return False

    def same_definition(self, x, y):
        """f(x) = ... and f(z) = ..., a_n = ... and a_k = ...: the same up to the parameters' names."""
        (name, params), (other, others) = parameters(x[0]), parameters(y[0])
        if not name or not other or len(params) != len(others):
            return label(x[0]) and label(y[0]) and compatible(x[0], y[0]) and self.equal(x[1], y[1])
        if name != other:
            return False
        marks = [("sym", "#%d" % i) for i in range(len(params))]
        return self.equal(substitute(x[1], dict(zip(params, marks))), substitute(y[1], dict(zip(others, marks))))

    def same_members(self, a, b):
        x, y = (flatten(n) for n in (a, b))
        if "set" in (a[0], b[0]) or all(n[0] == "tuple" for n in x + y):
            x, y = ([m for i, m in enumerate(n) if not any(m == o for o in n[:i])] for n in (x, y))
        if len(x) != len(y):
            return False
        names = [[n[2] if n[0] == "rel" and n[1] == "=" and label(n[2]) else None for n in z] for z in (x, y)]
        if all(names[0]) and all(names[1]) and len(set(names[0])) > 1 and set(names[0]) != set(names[1]):
            if all(n[0] == "sym" for z in names for n in z):
                return False
        if len(set(names[0])) == len(x) > 1 and all(names[0]) and not any(names[1]) and a[0] == b[0] == "list":
            return self.match(x, y)
        return self.match(x, y)

    def match(self, x, y):
        rest = list(y)
        for m in x:
            found = next((i for i, n in enumerate(rest) if self.equal(m, n)), None)
            if found is None:
                return False
            del rest[found]
        return True

    # Sets of reals: sorted disjoint pieces (low, low closed, high, high closed) with float infinities.

    def endpoint(self, node):
        if infinite(node):
            return infinite(node)
        if symbols(node):
            return None
        try:
            value = self.evaluate(node)
        except ArithmeticError:
            return None
        return value if isinstance(value, Fraction) or value.real() else None

    def order(self, a, b):
        """-1, 0 or 1."""
        if isinstance(a, float) or isinstance(b, float):
            x, y = (n if isinstance(n, float) else 0.0 for n in (a, b))
            return (x > y) - (x < y)
        if self.same_number(a, b):
            return 0
        a, b = ball(a), ball(b)
        return 1 if a.re > b.re else -1

    def real_set(self, node):
        """The pieces of a set of reals, or None if the node is no such set."""
        self.attempt = None
        kind = node[0]
        if kind == "interval" or kind == "tuple" and len(node) == 3:
            ends = "()" if kind == "tuple" else node[3]
            low, high = self.endpoint(node[1]), self.endpoint(node[2])
            if low is None or high is None or self.order(low, high) > (0 if ends == "[]" else -1):
                return None
            return [(low, ends[0] == "[", high, ends[1] == "]")]
        if kind == "set" and len(node) > 1:
            ends = [self.endpoint(n) for n in node[1:]]
            return None if None in ends or any(isinstance(e, float) for e in ends) else self.union([(e, True, e, True) for e in ends])
        if node == ("sym", "R") or node == ("text", "all real numbers"):
            return [(-math.inf, False, math.inf, False)]
        if kind in ("cup", "cap", "setminus"):
            a, b = self.real_set(node[1]), self.real_set(node[2])
            if a is None or b is None:
                return None
            if kind == "cup":
                return self.union(a + b)
            return self.intersection(a, b if kind == "cap" else self.complement(b))
        if kind == "condition":
            parts = [self.real_set(n) for n in node[2:]]
            if None in parts:
                return None
            both = functools.reduce(self.intersection, parts)
            return self.union(sum(parts, [])) if node[1] == "or" or not both else both
        if kind == "rel" and len(symbols(node)) == 1:
            return self.solve(node)
        return None

    def solve(self, node):
        """The solution set of a chain of linear inequalities in one symbol, or None."""
        name = ("sym", *symbols(node))
        pieces = [(-math.inf, False, math.inf, False)]
        sides, ops = node[2:], node[1].split()
        for op, left, right in zip(ops, sides, sides[1:]):
            if op == "in":
                part = self.real_set(right) if left == name else None
            elif op not in ("<", ">", "<=", ">=", "!=") or op == "=":
                return None
            else:
                part = self.half_line(op, left, right, name)
            if part is None:
                return None
            pieces = self.intersection(pieces, part)
        return pieces

    def half_line(self, op, left, right, name):
        for x, y, o in ((left, right, op), (right, left, flip(op))):
            if x == name and infinite(y):
                return [(-math.inf, False, math.inf, False)]
        values = []
        for x in (0, 1, 2, 5):
            try:
                values.append(self.evaluate(substitute(("add", left, negative(right)), {name: num(x)})))
            except ArithmeticError:
                return None
        slope = add(values[1], mul(Fraction(-1), values[0]))
        for x, v in ((2, values[2]), (5, values[3])):
            if not self.same_number(add(mul(Fraction(x), slope), values[0]), v):
                return None
        try:
            bound = mul(mul(Fraction(-1), values[0]), inverse(slope))
        except ArithmeticError:
            return None
        if op == "!=":
            return [(-math.inf, False, bound, False), (bound, False, math.inf, False)]
        closed = op in ("<=", ">=")
        below = (op[0] == "<") == positive(slope)
        return [(-math.inf, False, bound, closed)] if below else [(bound, closed, math.inf, False)]

    def union(self, pieces):
        pieces = sorted(pieces, key=functools.cmp_to_key(lambda a, b: self.order(a[0], b[0]) or b[1] - a[1]))
        merged = []
        for low, low_closed, high, high_closed in pieces:
            if merged:
                before = merged[-1]
                gap = self.order(low, before[2])
                if gap < 0 or gap == 0 and (low_closed or before[3]):
                    further = self.order(high, before[2])
                    merged[-1] = (*before[:2], high if further > 0 else before[2],
                                  high_closed if further > 0 else before[3] or further == 0 and high_closed)
                    continue
            merged.append((low, low_closed, high, high_closed))
        return merged

    def intersection(self, a, b):
        found = []
        for p, q in itertools.product(a, b):
            low = max(p, q, key=functools.cmp_to_key(lambda s, t: self.order(s[0], t[0]) or t[1] - s[1]))[:2]
            high = min(p, q, key=functools.cmp_to_key(lambda s, t: self.order(s[2], t[2]) or s[3] - t[3]))[2:]
            width = self.order(low[0], high[0])
            if width < 0 or width == 0 and low[1] and high[1]:
                found.append((*low, *high))
        return self.union(found)

    def complement(self, pieces):
        found, low, closed = [], -math.inf, False
        for piece in pieces:
            if self.order(low, piece[0]) < 0 or closed and not piece[1] and self.order(low, piece[0]) == 0:
                found.append((low, closed, piece[0], not piece[1] and not isinstance(piece[0], float)))
            low, closed = piece[2], not piece[3]
        if low != math.inf:
            found.append((low, closed, math.inf, False))
        return found

    def same_set(self, a, b):
        return len(a) == len(b) and all(
            p[1] == q[1] and p[3] == q[3] and self.order(p[0], q[0]) == 0 and self.order(p[2], q[2]) == 0
            for p, q in zip(a, b))

    def same_interval(self, a, b):
        """Intervals with symbolic ends, or an interval and a < x < b."""
        a, b = as_interval(a), as_interval(b)
        return bool(a and b) and a[3] == b[3] and self.equal(a[1], b[1]) and self.equal(a[2], b[2])


def as_interval(node):
    if node[0] == "tuple" and len(node) == 3:
        return ("interval", *node[1:], "()")
    if node[0] == "rel" and len(node) == 5 and node[3][0] == "sym" and not node[3][1] in symbols(node[2]) | symbols(node[4]):
        ops = node[1].split()
        if set(ops) <= {"<", "<="}:
            return ("interval", node[2], node[4], ("[" if ops[0] == "<=" else "(") + ("]" if ops[1] == "<=" else ")"))
        if set(ops) <= {">", ">="}:
            return ("interval", node[4], node[2], ("[" if ops[1] == ">=" else "(") + ("]" if ops[0] == ">=" else ")"))
    return node if node[0] == "interval" else None


def infinite(node):
    """inf, -inf or 0.0 for a finite node."""
    if node[0] == "unit":
        return infinite(node[1])
    if node == INFINITY:
        return math.inf
    return -math.inf if node == negative(INFINITY) else 0.0


def singular(unit):
    unit = unit.strip(". ")
    return unit[:-1] if unit not in UNITS and unit.endswith("s") else unit


def measure(name):
    """(dimension, size) of a known unit, also squared and cubed: 'square cm', 'cm ^2'."""
    match = re.fullmatch(r"(?:(square|sq|cubic) )?(\S+?)(?: \^([23]))?", name)
    if not match or singular(match[2]) not in UNITS:
        return None
    power = int(match[3] or {None: 1, "cubic": 3}.get(match[1], 2))
    dimension, size = UNITS[singular(match[2])]
    return "%s^%d" % (dimension, power), Fraction(size)**power


def flip(ops):
    return " ".join(o.translate(str.maketrans("<>", "><")) for o in reversed(ops.split()))


def difference(sides):
    """left - right, times the denominators of its terms that hold symbols: y = 1/x and xy = 1 are one equation."""
    terms = [t for side in sides for t in (side[1:] if side[0] == "add" else side[1:] if side[0] == "mul" else [side])]
    below = dict.fromkeys(t[2] for t in terms if t[0] == "div" and symbols(t[2]))
    return ("mul", ("add", sides[0], negative(sides[1])), *below)


def numeric(sides):
    return all(n[0] not in ("list", "set", "tuple", "matrix", "row", "rel", "interval", "condition", "cup", "cap",
                            "setminus") for s in sides for n in walk(s))


def has_sign(node):
    return any(n[0] == "sign" for n in walk(node))


def branches(node):
    """Readings of a +- answer as lists: the signs tied together, or each on its own."""
    signs = sorted({n for n in walk(node) if n[0] == "sign"})
    if not signs:
        return [node]
    if len(signs) > MAX_SIGNS:
        raise Unreadable("more than %d plus-minus signs" % MAX_SIGNS)
    if node[0] in ("list", "set"):
        head = 2 if node[0] == "list" else 1
        parts = [branches(n) for n in node[head:]]
        return [(*node[:head], *itertools.chain(*(m[2:] if has_sign(n) else (m,) for m, n in zip(choice, node[head:]))))
                for choice in itertools.product(*parts)]
    tied = [substitute(node, {s: num(s[2] * t) for s in signs}) for t in (1, -1)]
    free = [substitute(node, dict(zip(signs, map(num, t)))) for t in itertools.product((1, -1), repeat=len(signs))]
    return [("list", "or", *tied)] + ([("list", "or", *free)] if len(signs) > 1 else [])


def flatten(node):
    """Members of a list or set."""
    return list(node[2:] if node[0] == "list" else node[1:])


def entries(node):
    """Members in order: of a tuple, a list, or a matrix of one column or one row."""
    if node[0] == "matrix":
        if all(len(row) == 2 for row in node[1:]):
            return [row[1] for row in node[1:]]
        return list(node[1][1:]) if len(node) == 2 else None
    return list(node[2:] if node[0] == "list" else node[1:])


def label(node):
    """Can this side of an equation be the name of what the other side is?"""
    kinds = {n[0] for n in walk(node)}
    if node[0] == "tuple":
        return all(map(label, node[1:]))
    if node[0] == "app":
        return True
    return bool(symbols(node)) and kinds <= {"sym", "text", "app", "mul", "abs", "fn", "ratio", "add", "deg", "log",
                                             "const", "div"} or node[0] == "fn" and bool(symbols(node))


def simple_label(node):
    return node[0] in ("sym", "text", "app", "fn") or node[0] == "tuple" and all(map(simple_label, node[1:]))


def readings(rel):
    """What a chain of equalities says: the value behind its labels, or the list of values of x = y = 1."""
    sides = list(rel[2:])
    if len(sides) == 2 and not label(sides[0]) and label(sides[1]) and "~" not in rel[1]:
        sides.reverse()
    if "~" in rel[1]:
        return [s for s in sides if not label(s)]
    last = sides[-1]
    constant = not symbols(last)
    if set(rel[1].split()) == {"="} and numeric(sides) and not any(label(s) for s in sides):
        return [last]
    if not all(label(s) and (constant or simple_label(s)) or not symbols(s) or i > 0 for i, s in enumerate(sides[:-1])):
        return []
    if not label(sides[0]) and symbols(sides[0]):
        return []
    names = [s for s in sides[:-1] if simple_label(s)]
    if len(names) == len(sides) - 1 > 1:
        return [last, ("list", ",", *[last] * len(names))]
    return [last]


def parameters(node):
    """(name, parameters) of f(x) or a_n, (None, ...) otherwise."""
    if node[0] == "app" and len(node) > 2 and all(isinstance(c, tuple) and c[0] == "sym" for c in node[2:]):
        return node[1], node[2:]
    if node[0] == "sym" and "_" in node[1]:
        name, index = node[1].split("_", 1)
        if len(index) == 1 and index.isalpha():
            return name, (("sym", index),)
    return None, ()


def compatible(a, b):
    """May two labels name one quantity?  m and m_max, S and S_n, y and f(x)."""
    def base(n):
        return n[1].split("_")[0].lower() if n[0] in ("sym", "app") and isinstance(n[1], str) else n
    if a[0] == "text" or b[0] == "text":
        return True
    if {a[0], b[0]} == {"app", "sym"} and ("sym", "y") in (a, b):
        return True
    return base(a) == base(b)


# Verdicts.

class Reading:
    """One side: its tokens and the nodes that they can mean."""

    def __init__(self, text):
        self.nodes, self.problem, self.tokens, self.words = [], None, None, ()
        if len(text) > MAX_CHARS:
            self.problem = "more than %d characters" % MAX_CHARS
            return
        try:
            text = clean(text)
        except Unreadable as error:
            self.problem = str(error)
            return
        variants = [(text, True)]
        groups = [m for m in GROUPED.finditer(text) if not depth_at(text, m.start())]
        if groups:
            grouped = GROUPED.sub(lambda m: m.group() if depth_at(text, m.start()) else m.group().replace(",", ""), text)
            variants.insert(0, (grouped, True))
        if re.search(r"\d[eE]-\d", text):
            variants.append((text, False))
        for variant, scientific in variants:
            try:
                tokens = tokenize(variant, scientific)
                if self.tokens is None:
                    self.tokens = [t[1] for t in tokens]
                self.nodes.append(Parser(qualified(tokens)).answer())
            except (Unreadable, RecursionError) as error:
                self.problem = str(error) or "too deeply nested"
        plain = re.sub(r"\\(?:text|textbf|mathrm|mbox|textit|rm|bf)(?![a-z])|[{}$\\]", " ", text).lower()
        self.words = tuple(w for w in re.findall(r"[^\W_]+|[^\w\s]", plain.rstrip(". ")) if w not in ("a", "an", "the"))
        found = re.match(r"\s*(?:\\(?:text|textbf|mathrm|mbox)\s*\{)?\s*(?:(?:[Oo]ption|[Cc]hoice)\s+)?(\()?\s*([A-Ja-j])\s*([).:])?\s*\}?(?![A-Za-z0-9])\s*[.)]?\s*", text)
        self.choice = self.rest = None
        if found:
            bare = found.end() >= len(text.rstrip())
            explicit = found[3] == ")" or found[3] and found[2].isupper() or r"\text" in found[0] or r"\m" in found[0]
            if bare and (explicit or found[2].isupper()) or explicit and not bare:
                self.choice = found[2].upper()
                self.rest = re.sub(r"^\s*(?:\\[ ,;:]|\\quad|\\text\{\s*\})*\s*", "", text[found.end():]) if not bare else ""


def depth_at(text, position):
    before = text[:position]
    return sum(before.count(c) for c in ("(", "[", r"\{")) - sum(before.count(c) for c in (")", "]", r"\}"))


def qualified(tokens):
    """Without a trailing side remark: 'for all x', 'where k is an integer', '(k in Z)'."""
    depth = 0
    for i, (kind, value, _) in enumerate(tokens):
        if value in ("(", "[", "{", "{{"):
            if kind == "o" and value == "(" and depth == 0 and i and tokens[i + 2:i + 3] and tokens[i + 2][1] == "in" and tokens[-1][1] == ")":
                return tokens[:i]
            depth += 1
        elif value in (")", "]", "}", "}}"):
            depth -= 1
        elif i and depth == 0 and (kind == "t" and value in QUALIFIERS or (kind, value) == ("c", "forall")):
            rest = [t[1] for t in tokens[i + 1:]]
            if value in ("if", "when", "for", "as") and {",", "and", "or", "if", "otherwise"} & set(rest):
                return tokens
            head = tokens[:i]
            while head and head[-1][1] == ",":
                head = head[:-1]
            return head
    return tokens


def verdict(prediction, gold):
    """(equal?, why, prediction's reading, gold's reading)."""
    p, g = Reading(prediction), Reading(gold)
    if not p.tokens or not g.tokens:
        return False, p.problem or g.problem or "an empty answer", p, g
    if p.tokens == g.tokens:
        return True, "the same text", p, g
    if p.choice and g.choice:
        if p.choice != g.choice:
            if p.rest or g.rest or p.choice:
                return False, "different choices", p, g
        if not p.rest or not g.rest:
            return True, "the same choice", p, g
        return answers_match(p.rest, g.rest), "the texts of the same choice", p, g
    problem = None
    with decimal.localcontext(CONTEXT):
        for a, b in itertools.product(p.nodes, g.nodes):
            try:
                if Comparison().equal(a, b):
                    return True, "equal values", p, g
            except (Unreadable, ArithmeticError, RecursionError) as error:
                problem = str(error) or "too deeply nested"
    if not p.nodes and not g.nodes and p.words and p.words == g.words:
        return True, "the same words", p, g
    for x, y in ((p, g), (g, p)):
        if x.choice and x.rest and not y.choice:
            return verdict(x.rest, gold if x is p else prediction)[:2] + (p, g)
    return False, p.problem or g.problem or problem or "different values", p, g


def answers_match(prediction, gold):
    """Are two bare answers (no box around them) equal?  Symmetric; never raises on text, whatever it holds."""
    return verdict(prediction, gold)[0]


BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{)?|\\.|[{}]", re.DOTALL)


def extract_answer(text):
    """The content of the last complete \\boxed{...} or \\fbox{...} (also \\boxed 5); None if there is none or it is empty."""
    answer, opened = None, []
    for match in BOX.finditer(text):
        token = match.group()
        if token.startswith((r"\boxed", r"\fbox")):
            if match[1]:
                opened.append(match.end())
            else:
                short = re.compile(r"[^\s${}\\]+").match(text, match.end())
                answer = short.group() if short else answer
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None:
                answer = text[start:match.start()]
    return answer.strip() or None if answer is not None else None


def is_correct(response, gold):
    """Does the last box of a response equal gold, or one of a list of acceptable golds?"""
    answer = extract_answer(response)
    golds = [gold] if isinstance(gold, str) else gold
    return answer is not None and any(answers_match(answer, g) for g in golds)


def explain(prediction, gold):
    """How each side was read and why the verdict is what it is, as text."""
    equal, why, p, g = verdict(prediction, gold)
    return "prediction: %s\ngold: %s\n%s: %s" % (p.nodes or p.problem, g.nodes or g.problem, "equal" if equal else "not equal", why)
