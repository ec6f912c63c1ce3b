"""Is this final answer equal to the gold one?  One file, standard library only; copy it anywhere.

    extract_answer(text)              content of the last complete \\boxed{...} or \\fbox{...}, else None
    answers_match(prediction, gold)   are two bare answers equal?  symmetric
    is_correct(response, gold)        does the response's last box equal gold, or one of a list of golds?
    explain(prediction, gold)         how each side was read, and why the verdict is what it is

    python answer_checker.py '\\frac{1}{2}' 0.5
    python answer_checker.py --file rows.jsonl       rows with "gold" and "prediction" or "response"

Accepts LaTeX and plain-text mathematics: numbers (fractions, mixed and repeating decimals, thousands
separators, scientific notation, percent, degrees, currency, bases, units and words around a number), roots,
powers, logarithms, trigonometry, factorials, binomials, floors, absolute values, complex numbers,
expressions in variables, lists and sets (unordered), tuples and vectors (ordered), matrices, intervals,
unions, inequalities and set-builder notation (as sets of reals), equations (up to a non-zero factor), x = 5
and other labelled answers, function definitions, +-, ratios, clock times, choice letters, short texts.

Refuses (the verdict is "not equal" unless both texts are the same): sums, integrals and limits, solving
non-linear equations and inequalities (but |u| < c), rounding (0.333 is not 1/3), answers with words that
negate, and everything past the limits below. Where readings differ it takes the usual one: 1\\frac{3}{4} is
a mixed number, 1/2x is x/2, log without a base is any one base, (a, b) is a point or an open interval, f(2)
is an application and n(n+1) a product, the variables of formulas in several variables are positive.

Costs about 0.2 ms for a usual pair, 0.3 s at the very most. Nothing is executed; no text reaches eval or a
computer algebra system. A small grammar parses the text; numbers are exact fractions or 60-digit complex
balls (a value and a bound on its error); expressions in variables are compared at fixed pseudo-random
points where both are defined, exactly where they are rational. Length, nesting, digits, exponents, branches
and total work are bounded before anything is computed, so there is no timeout, and every thread gets the
same verdict.
"""
import argparse
import decimal
import functools
import itertools
import json
import math
import random
import re
import sys
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
MAX_FACTORIAL = 3000
MAX_WORK = 100_000  # steps in one comparison, each about two microseconds


class Unreadable(ValueError):
    """The text is not in the grammar, or is past a limit."""


class Undefined(ArithmeticError):
    """The expression has no value here (or none that the limits allow to compute)."""


# Tokenizer: text -> [(kind, value, space before?)]
# Kinds: n(umber), v(ariable), c(ommand), t(ext word), o(perator).

SYNONYMS = dict(pair.rsplit("=>", 1) for pair in r"""
    \cdot=>* \times=>* \ast=>* **=>^ \div=>/ \slash=>/ \le=><= \leq=><= \leqslant=><= \leqq=><= \ge=>>=
    \geq=>>= \geqslant=>>= \geqq=>>= \lt=>< \gt=>> \ne=>!= \neq=>!= \approx=>~ \simeq=>~ \doteq=>~ ===>=
    :==>= \in=>in \notin=>notin \cup=>cup \cupdot=>cup \bigcup=>cup \cap=>cap \setminus=>setminus
    \backslash=>setminus \pm=>pm \mp=>mp \mid=>| \vert=>| \lvert=>| \rvert=>| \|=>|| \Vert=>|| \lVert=>||
    \rVert=>|| \{=>{{ \}=>}} \lbrace=>{{ \rbrace=>}} \lbrack=>[ \rbrack=>] \lparen=>( \rparen=>) \langle=><(
    \rangle=>)> \colon=>: ;=>, \to=>-> \rightarrow=>-> \equiv=>equiv \circ=>deg \degree=>deg
    \textdegree=>deg \%=>% \land=>and \wedge=>and \lor=>or \vee=>or \prime=>' \\=>newline \newline=>newline
    \cr=>newline""".split())
DROPPED = set(r"""~ $ \$ \, \; \: \! \> \( \) \[ \] \quad \qquad \thinspace \enspace \displaystyle
    \textstyle \scriptstyle \limits \nolimits \boxed \fbox \underline \angle \measuredangle \triangle
    \hfill \strut \mathstrut \mathop \bf \rm \it \normalsize \large \Large \nonumber""".split()) | {"\\ "}
TEXT = set(r"\text \textbf \textit \textrm \textsf \texttt \textsc \textnormal \mbox \hbox \emph".split())
FONT = set(r"""\mathrm \mathbf \mathit \mathsf \mathcal \mathfrak \mathbb \boldsymbol \bm
    \operatorname""".split())
ALIASES = dict(pair.split(":") for pair in """asin:arcsin acos:arccos atan:arctan cosec:csc tg:tan ctg:cot
    arctg:arctan infinity:infty inf:infty oo:infty dfrac:frac tfrac:frac cfrac:frac dbinom:binom
    tbinom:binom varnothing:emptyset varphi:phi varepsilon:epsilon overrightarrow:vec""".split())
ACCENTS = set("overline vec hat bar dot ddot tilde widehat widetilde".split())
REFUSED = set("""int iint oint sum prod lim limsup liminf ldots dots cdots vdots def write input end
    rfloor rceil forall exists implies Rightarrow iff""".split())
TRIGONOMETRIC = {a + f + h for f in ("sin", "cos", "tan", "cot", "sec", "csc")
                 for a, h in (("", ""), ("arc", ""), ("", "h"))}
FUNCTIONS = TRIGONOMETRIC | {"ln", "log", "lg", "exp", "sqrt"}
OPAQUE = set("max min gcd lcm arg det deg dim Re Im sgn sign erf rank tr ker".split())
NAMED = FUNCTIONS | OPAQUE | {"abs", "floor", "ceil"}
UNITS = {name: (dimension, Fraction(size)) for dimension, units in {  # units of one dimension are converted
    "metre": "mm:1/1000 millimeter:1/1000 cm:1/100 centimeter:1/100 m:1 meter:1 km:1000 kilometer:1000",
    "foot": "inch:1/12 inche:1/12 in:1/12 ft:1 feet:1 foot:1 yard:3 mile:5280", "clock": "am:1 pm:2",
    "second": "s:1 sec:1 second:1 min:60 minute:60 h:3600 hr:3600 hour:3600 day:86400 week:604800",
    "gram": "mg:1/1000 g:1 gram:1 kg:1000 kilogram:1000", "dollar": "cent:1/100 dollar:1 usd:1"}.items()
    for name, size in (unit.split(":") for unit in units.split())}
MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMERALS = {word: value for value, word in enumerate("""zero one two three four five six seven eight nine ten
    eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty""".split())}
NEGATIONS = set("not no except without never isn't neither nor non".split())
QUALIFIERS = set("where such given since because provided with for if when as".split())
WORDS = {*UNITS, *(u + "s" for u in UNITS if len(u) > 2), *MULTIPLIERS, *NUMERALS, *NEGATIONS, *QUALIFIERS,
         *"""the is are mph rpm per percent degree degrees radian radians unit square cubic sq lb lbs oz ml
         kcal all any yes th st nd rd""".split()} - {"s", "m", "h", "g"}
UNICODE = {word[0]: word[1:] + " " * (word[1:2] == "\\") for word in r"""
    −- –- —- ‐- ×* ·* ∙* ⋅* ÷/ ∕/ ⁄/ ≤<= ⩽<= ≥>= ⩾>= ≠!= ≈\approx ≡\equiv ∞\infty ∪\cup ∩\cap ∈\in
    ∉\notin √\sqrt ∛\sqrt[3] °\degree º\degree ∘\circ ±\pm ∓\mp ∅\emptyset ∣| →\to ′' ″'' ‘' ’' “ ”
    ⟨\langle 〈\langle ⟩\rangle 〉\rangle ⌊\lfloor ⌋\rfloor ⌈\lceil ⌉\rceil ∧\land ∨\lor ∖\setminus ￥$ ¥$
    £$ €$ ¢cents ℝ\mathbb{R} ℤ\mathbb{Z} ℕ\mathbb{N} ℚ\mathbb{Q} ℂ\mathbb{C} ∠\angle 
    ∶: ，, ；, （( ）)""".split()}
SCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", ("^" + c for c in "0123456789+-n")))
SCRIPTS.update(zip("₀₁₂₃₄₅₆₇₈₉", ("_" + c for c in "0123456789")))


def clean(text):
    """One spelling for Unicode mathematics, doubled backslashes, grouped digits and typographic spaces."""
    out = []
    for char in text.strip(" \t\r\n"):
        if char.isascii():
            out.append(char if char >= " " else {"\f": "\\f", "\b": "\\b"}.get(char, " "))  # unescaped \frac
        elif char in SCRIPTS:
            mark, digit = SCRIPTS[char]
            if out and out[-1].startswith(mark + "{"):  # extend the script that the character before opened
                out[-1] = out[-1][:-1] + digit + "}"
            else:
                out.append("%s{%s}" % (mark, digit))
        elif char in UNICODE:
            out.append(UNICODE[char])
        else:
            name, plain = unicodedata.name(char, ""), unicodedata.normalize("NFKC", char)
            if re.fullmatch("GREEK (SMALL|CAPITAL) LETTER [A-Z]+", name):
                letter = name.rsplit(" ", 1)[1].lower().replace("lamda", "lambda")
                out.append("\\%s " % (letter if "SMALL" in name else letter.capitalize()))
            elif "\N{FRACTION SLASH}" in plain:
                out.append(r"\frac{%s}{%s}" % tuple(p or "1" for p in plain.split("\N{FRACTION SLASH}")))
            elif name.startswith(("CIRCLED DIGIT", "CIRCLED NUMBER")):  # labels of statements: a list
                out.append("," + plain)
            elif unicodedata.category(char) not in ("Cf", "Cc"):
                out.append(plain)
    text = "".join(out).lstrip(",")
    if r"\begin" not in text.replace(r"\\begin", ""):
        text = re.sub(r"\\\\(?=[A-Za-z{}()\[\]%$,;!|])", r"\\", text)  # JSON-escaped once too often
    for pattern, replacement in (
            (r"\\(?:text)?color\s*\{[^{}]*\}", " "), (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
            (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", " "),
            (r"(?<=\d)\s*(?:,\s*\\!|\{,\}|\\[,;: !]|~)\s*(?=\d{3}(?!\d))", ""), (r"(?<=\d)\{,\}(?=\d)", "."),
            (r"(?<![\d.,\w}])\d{1,3}(?: \d{3})+(?![\d.])", lambda match: match.group().replace(" ", "")),
            (r"\\+\s*$", ""),
            (r"(?i)(\d[\s~]*(?:\\(?:text|mathrm)\{|\\[ ,])?\s*)([ap])\.?\s?m(?![a-z^_])\.?",
             r"\1\\text{\2m}")):
        text = re.sub(pattern, replacement, text)
    return text


TOKENS = [re.compile(r"""
    (?P<n>(?:\d[\dA-F]*[A-F][\dA-F]*(?=_\{?1[1-6])|\d*\.\d*\\(?:overline|bar|dot)\s*\{\d+\}
        |\d+(?:\.\d+)?|\.\d+)%s)
    | (?P<c>\\[A-Za-z]+|\\.) | (?P<w>[A-Za-z]+)
    | (?P<o><=|>=|!=|==|:=|\*\*|->|\.\.\.|\S)"""
                     % exponent, re.VERBOSE) for exponent in ("", r"(?:[eE](?:-?\d+|\+\d\d+)(?!\d|\.\d))?")]
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
PIECES = re.compile("|".join(sorted(FUNCTIONS, key=len, reverse=True)) + "|pi|.")


def letters(word, before, after):
    """Tokens of a run of plain letters: an operator, a function, a word of prose, or variables."""
    low, name = word.lower(), ALIASES.get(word, word)
    if name in NAMED or name in ("infty", "pi", "alpha", "theta", "Interval"):
        return [("c", name)]
    if low in ("and", "or") or low == "in" and after in ("[", "(", "{", "\\"):
        return [("o", low)]
    unit = word == low and (before.isdigit() or before == "}")
    if low in WORDS and (len(word) > 2 or (unit if low in UNITS else not after or after.isalnum() or after in ".,")):
        return [("t", low)]
    pieces = PIECES.findall(word)
    singles = sum(len(p) == 1 for p in pieces)
    if singles < len(pieces) and singles <= 3 and ("pi" not in pieces or len(word) <= 3):  # xsinx, not "spin"
        return [("c" if len(p) > 1 else "v", p) for p in pieces]
    return [("t", low)] if len(word) > 3 and after not in ("^", "_") else [("v", c) for c in word]


def tokenize(text, scientific):
    """scientific: is 2e-3 a number, or 2e - 3?"""
    tokens, groups, opens, end = [], [], None, 0  # groups: what each open brace belongs to
    for match in TOKENS[scientific].finditer(text):
        kind, value, space, opening = match.lastgroup, match.group(), match.start() > end, opens
        end, opens = match.end(), None
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("more than %d tokens" % MAX_TOKENS)
        if value in TEXT or value in FONT:
            opens = "text" if value in TEXT else "font"
            continue
        if value == "{":
            groups.append(opening)
        elif value == "}" and not groups:
            raise Unreadable("unbalanced }")
        if value == "{" and opening or value == "}" and groups.pop():
            continue
        if value in DROPPED:
            end = -1  # counts as a space
            continue
        value = SYNONYMS.get(value, value)
        if kind == "w":
            font = opening or groups and groups[-1]
            if value.lower() in ("and", "or"):
                found = [("o", value.lower())]
            elif "text" in groups or opening == "text" or font and len(value) > 1 and value not in NAMED:
                found = [("t", value if len(value) == 1 else value.lower())]
            elif font:  # \mathrm{m} is a metre, \mathrm{e} a number
                found = [("t" if value in "msghNJWVKL" else "v" if len(value) == 1 else "c", value)]
            else:
                before = text[max(0, match.start() - 9):match.start()].rstrip(" ~\\,")
                found = letters(value, before[-1:], text[end:end + 9].lstrip()[:1])
            tokens += [(k, v, space and i == 0) for i, (k, v) in enumerate(found)]
        elif kind == "c" and value[0] == "\\":
            tokens.append(("c", ALIASES.get(value[1:], value[1:]), space))
        else:
            tokens.append(("n" if kind == "n" else "o", value, space))
    if groups:
        raise Unreadable("unbalanced {")
    while tokens and tokens[-1][:2] in (("o", "."), ("o", ",")):
        tokens.pop()
    return tokens


# Parser: tokens -> nested tuples (kind, children...); a child is a node, a string or a number.

ENVIRONMENTS = set("matrix pmatrix bmatrix smallmatrix array cases aligned align gathered split".split())
RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "~", "in", "notin", "->", "equiv"}
CLOSERS = {")", "]", "}", "}}", ")>", "|", "||", "rfloor", "rceil", "newline", "&", "end", "["}
PAIRS = {"(": ")", "[": "]", "{": "}", "{{": "}}"}
COMPOUND = set("matrix tuple row rel list set interval family cup cap setminus condition".split())
NUMBER_SETS = {("sym", name) for name in "RZNQC"}
INFINITY, E, I = ("const", "inf"), ("const", "e"), ("const", "i")


def num(value):
    return ("num", Fraction(value))


def walk(node):
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(c for c in node[1:] if isinstance(c, tuple))


def symbols(*nodes):
    return {n[1] for node in nodes for n in walk(node) if n[0] in ("sym", "text", "app")}


def substitute(node, mapping):
    if node in mapping:
        return mapping[node]
    return tuple(substitute(c, mapping) if isinstance(c, tuple) else c for c in node)


def negative(node):
    return ("num", -node[1]) if node[0] == "num" else scale(num(-1), node)


def scale(left, right):
    """A product; a number times a matrix or a tuple goes into its entries."""
    if left[0] in COMPOUND and right[0] in COMPOUND:
        raise Unreadable("a product of a %s and a %s" % (left[0], right[0]))
    for a, b in ((left, right), (right, left)):
        if b[0] in ("matrix", "tuple", "row"):
            return (b[0], *(scale(a, c) for c in b[1:]))
        if b[0] in COMPOUND:
            raise Unreadable("a product with a %s" % b[0])
    return (*left, right) if left[0] == "mul" else ("mul", left, right)


def members_of(node):
    """Of a list, a set, a tuple, a row, or a matrix of one column or one row."""
    if node[0] == "matrix":
        return [row[1] for row in node[1:]] if all(len(row) == 2 for row in node[1:]) else (
            list(node[1][1:]) if len(node) == 2 else [])
    return list(node[2:] if node[0] == "list" else node[1:])


class Parser:
    """Recursive descent: each method reads tokens from position i on and returns a node."""

    def __init__(self, tokens):
        self.tokens, self.i, self.depth, self.bars, self.signs = tokens, 0, 0, 0, 0

    def peek(self, ahead=0):
        j = self.i + ahead
        return self.tokens[j] if 0 <= j < len(self.tokens) else ("end", "", False)

    def value(self, ahead=0):
        """The operator or command here, None for numbers, variables and words."""
        kind, value, _ = self.peek(ahead)
        return value if kind in ("o", "c") else None

    def accept(self, *values):
        if self.value() in values:
            self.i += 1
            return self.tokens[self.i - 1][1]
        return None

    def expect(self, *values):
        found = self.accept(*values)
        if not found:
            raise Unreadable("expected %s, found %s" % (" or ".join(values), self.peek()[1] or "the end"))
        return found

    def nested(self, rule, *closers, bars=0):
        """One level deeper: a rule and its closing token, which is returned too if there is a choice."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested more than %d deep" % MAX_DEPTH)
        outer, self.bars = self.bars, bars
        node = rule()
        closer = self.expect(*closers) if closers else None
        self.bars = outer
        self.depth -= 1
        return (node, closer) if len(closers) > 1 else node

    def answer(self):
        while self.accept("=", ",", ":", "~"):
            pass
        node = self.members()
        if self.peek()[0] != "end":
            raise Unreadable("unexpected %s" % self.peek()[1])
        return node

    def members(self):
        """Relations separated by commas, 'and', 'or': a list, unless there is only one."""
        items, joints = [self.relation()], set()
        while joint := self.accept(",", "and", "or", "newline"):
            while more := self.accept(",", "and", "or", "newline"):  # ", and"
                joint = more
            if self.peek()[0] == "end" or self.value() in CLOSERS:
                break
            joints.add(joint)
            items.append(self.relation())
        said = [x for x in items if x[0] == "rel" and x[1] == "in" and x[-1] in NUMBER_SETS]
        rest = [x for x in items if x not in said]
        if said and rest:  # "k in Z" beside a solution says what k is
            return ("family", rest[0] if len(rest) == 1 else ("list", ",", *rest), said[0][2])
        joint = "or" if "or" in joints else "and" if "and" in joints else ","
        return items[0] if len(items) == 1 else ("list", joint, *items)

    def relation(self):
        sides, ops = [self.set_expression()], []
        while self.value() in RELATIONS:
            ops.append(self.accept(*RELATIONS))
            sides.append(self.set_expression())
        return ("rel", " ".join(ops), *sides) if ops else sides[0]

    def set_expression(self):
        node = self.ratio()
        while op := self.accept("cup", "cap", "setminus"):
            right = self.ratio()
            node = (*node, right) if node[0] == op == "cup" else (op, node, right)
        return node

    def ratio(self):
        parts = [self.sum()]
        while self.accept(":"):
            parts.append(self.sum())
        if len(parts) == 1:
            return parts[0]
        if parts[0][0] == "text":  # "Answer: 5"
            return ("rel", "=", *parts)
        if parts[-1][0] == "unit":  # 4:30 pm
            return ("unit", ("ratio", *parts[:-1], parts[-1][1]), parts[-1][2])
        return ("ratio", *parts)

    def sum(self):
        terms = []
        while True:
            sign, start = num(1), self.i
            while op := self.accept("+", "-", "pm", "mp"):
                if op in ("pm", "mp"):
                    self.signs += 1
                    sign = scale(sign, ("sign", self.signs, 1 if op == "pm" else -1))
                elif op == "-":
                    sign = negative(sign)
            if self.i - start > 2:
                raise Unreadable("too many signs")
            if terms and self.i == start:
                return ("add", *terms) if len(terms) > 1 else terms[0]
            term = self.product()
            terms.append(term if sign == num(1) else negative(term) if sign == num(-1) else scale(sign, term))

    def starts_factor(self):
        value = self.value()
        if value in ("(", "{", "{{", "<(", "|", "||"):
            return value not in ("|", "||") or not self.bars
        return self.peek()[0] in ("n", "v", "t") or self.peek()[0] == "c" and value not in CLOSERS

    def words_before(self):
        """Drop prose before a value; True if there was some."""
        start = self.i
        while self.peek()[0] == "t" or self.i > start and self.value() == ",":
            self.i += 1
        words = [t[1] for t in self.tokens[start:self.i]]
        if not words or words[-1] in NUMERALS or not self.starts_factor() and self.value() not in ("-", "["):
            self.i = start
            return False
        if NEGATIONS & set(words):
            raise Unreadable("words change the meaning")
        return True

    def product(self):
        if self.words_before():
            node = self.nested(self.sum, bars=self.bars)
            if node[0] in ("sym", "app") and self.value() not in RELATIONS:
                raise Unreadable("words around a symbol")
            return node
        node = last = self.factor()
        slashes = 0
        while True:
            kind, value, _ = self.peek()
            if kind == "o" and value in ("*", "/"):
                self.i += 1
                if self.peek()[0] == "t":  # m / s
                    continue
                sign = self.accept("-", "+")
                last = self.factor()
                slashes += value == "/"
                while value == "/" and self.peek(-1)[0] == self.peek()[0] == "v" and not self.peek()[2]:
                    last = scale(last, self.factor())  # t/RC
                last = negative(last) if sign == "-" else last
                if value == "/" and slashes > 16:
                    raise Unreadable("more than 16 slashes in a row")
                if value == "/":
                    node = scale(node, ("div", num(1), last)) if node[0] in COMPOUND else ("div", node, last)
                else:
                    node = scale(node, last)
            elif value in ("pmod", "bmod", "mod") and kind == "c":
                start = self.i = self.i + 1
                self.factor()
                modulus = "".join(t[1] for t in self.tokens[start:self.i] if t[1] not in "{}()")
                node = ("unit", node, "mod " + modulus)
            elif kind == "t":
                node = self.units(node)
            elif not self.starts_factor():
                return node
            elif mixed := self.mixed(node):
                node = last = self.postfix(mixed)
            else:
                if kind == "n" and last[0] in ("num", "sym"):
                    raise Unreadable("a number after a number")
                last = self.factor()
                if last[0] == "div" and last[1][0] == last[2][0] == "text":  # \frac{\text{m}}{\text{s}}
                    node = ("unit", node, "%s / %s" % (last[1][1], last[2][1]))
                else:
                    node = scale(node, last)

    def mixed(self, whole):
        """1 \\frac{3}{4} or 1 3/4: a proper fraction of two numerals after an integer numeral."""
        if whole[0] != "num" or whole[1].denominator != 1 or self.peek(-1)[0] != "n":
            return None
        start, part = self.i, None
        if self.peek()[0] == "n" and self.value(1) == "/" and self.peek(2)[0] == "n":
            part = ("div", self.number(self.peek()[1], 3), self.number(self.peek(-1)[1]))
        elif self.accept("frac"):
            part = self.command("frac")
        if part and part[0] == "div" and part[1][0] == part[2][0] == "num":
            top, bottom = part[1][1], part[2][1]
            if 0 < top < bottom and top.denominator == bottom.denominator == 1:
                return ("num", whole[1] + top / bottom)
        self.i = start
        return None

    def units(self, node):
        """Words after a value, with their powers and slashes: its unit, or a mark or factor of its own."""
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
        if self.starts_factor():
            raise Unreadable("words inside a formula")
        if node[0] == "sym" and singular(words[0]) not in UNITS:
            raise Unreadable("words around a symbol")
        for word in words:
            node = scale(node, num(MULTIPLIERS[word])) if word in MULTIPLIERS else node
        words = [w for w in words if w not in MULTIPLIERS]
        if not words or node[0] in ("unit", "list"):
            return node
        if words[0] in ("degrees", "degree", "percent"):
            return ("pct" if words[0] == "percent" else "deg", node)
        return ("unit", node, " ".join(words))

    def factor(self):
        return self.postfix(self.atom())

    def postfix(self, node):
        for _ in range(8):
            op = self.accept("^", "deg", "%", "!", "'", "''", "_")
            if op == "^":
                exponent = ("star",) if self.accept("*") else self.script()
                if exponent == ("deg",):
                    node = self.degree(node)
                elif exponent == ("prime",):
                    node = self.prime(node)
                elif exponent == ("star",):  # conjugate or dual: another symbol
                    node = ("app", "*", node)
                elif exponent[0] != "text" or exponent[1] not in ("th", "st", "nd", "rd"):
                    node = ("pow", node, exponent)
            elif op == "deg":
                node = self.degree(node)
            elif op == "%":
                node = ("pct", node)
            elif op == "!":
                node = ("double_factorial" if self.accept("!") else "factorial", node)
            elif op == "_":
                if node[0] in COMPOUND:
                    raise Unreadable("a subscript on a %s" % node[0])
                node = ("app", "_", node, self.script())
            elif op:
                node = self.prime(node)
            else:
                return node
        raise Unreadable("more than 8 marks on one factor")

    def degree(self, node):
        if self.peek()[0] in ("v", "t") and self.peek()[1] in ("C", "F", "c", "f"):
            self.i += 1
        return ("deg", node)

    def prime(self, node):
        if node[0] == "num":  # feet, or minutes of arc: a unit
            return node
        return ("sym", node[1] + "'") if node[0] == "sym" else ("app", "'", node)

    def script(self):
        """What follows ^ or _: a group, a mark, a signed number, or one atom."""
        inner = [t[1] for t in self.tokens[self.i:self.i + 4]]
        braced = inner[:1] == ["{"] and "}" in inner
        mark = "".join(inner[1:inner.index("}")] if braced else inner[:1])
        if mark in ("deg", "'", "''") or braced and mark in ("th", "st", "nd", "rd"):
            self.i += inner.index("}") + 1 if braced else 1
            return ("deg",) if mark == "deg" else ("prime",) if mark[0] == "'" else ("text", mark)
        if self.accept("{"):
            return self.nested(self.members, "}")
        sign = self.accept("-", "+")
        node = self.nested(self.factor if self.value(1) in ("^", "!") else self.atom)
        return negative(node) if sign == "-" else node

    def argument(self):
        """A TeX argument: a group, or one token, of which a number gives its first digit only."""
        kind, value, _ = self.peek()
        if kind == "n" and len(value) > 1 and value.isdigit():
            self.tokens[self.i] = ("n", value[1:], False)
            return num(int(value[0]))
        return self.nested(self.members, "}") if self.accept("{") else self.nested(self.atom)

    def subscript(self):
        """The text of a subscript, so that x_1, x_{1} and x_{\\text{1}} are one symbol."""
        start, depth = self.i, 0
        while True:
            kind, value, _ = self.peek()
            if kind == "end" or depth == 0 and kind == "o" and value != "{":
                raise Unreadable("a bad subscript")
            depth += (value == "{") - (value == "}")
            self.i += 1
            if not depth:
                return "".join(t[1] for t in self.tokens[start:self.i] if t[1] not in ("{", "}"))

    def symbol(self, name):
        if self.accept("_"):
            name += "_" + self.subscript()
        while mark := self.accept("'", "''"):
            name += mark
        ahead = "".join(t[1] for t in self.tokens[self.i:self.i + 6])
        if name in ("f", "g", "h") and ahead == "^{-1}(":
            self.i += 5
            name += "^-1"
        if self.value() == "(" and self.applies(name):
            self.i += 1
            inner = self.nested(self.members, ")")
            return ("app", name, *(inner[2:] if inner[0] == "list" else (inner,)))
        return E if name == "e" else I if name == "i" else ("sym", name)

    def applies(self, name):
        """Does name( start a function application?  Else it is a product, as in n(n+1)."""
        if name.rstrip("'^-1") in ("f", "g", "h", "F", "G", "H"):
            return True
        depth, comma = 1, False
        for j in range(self.i + 1, min(self.i + 14, len(self.tokens))):
            kind, value, _ = self.tokens[j]
            depth += (value in ("(", "[")) - (value in (")", "]")) if kind == "o" else 0
            comma = comma or depth == 1 and value == ","
            if not depth:
                inside, after = self.tokens[self.i + 1:j], [t[1] for t in self.tokens[j + 1:j + 2]]
                return comma or len(inside) == 1 and (inside[0][0] == "n" or after == ["="])
        return False

    def atom(self):
        kind, value, _ = self.peek()
        self.i += 1
        if kind == "n":
            return self.number(value)
        if kind == "v":
            return self.symbol(value)
        if kind == "c":
            return self.command(value)
        if kind == "t":
            words = [value]
            while self.peek()[0] == "t":
                words.append(self.peek()[1])
                self.i += 1
            text = " ".join(words)
            return num(NUMERALS[text]) if text in NUMERALS else ("text", text)
        if value in ("(", "["):
            return bracket(*self.nested(self.members, ")", "]"), value)
        if value == "]":  # ]0,1[
            node, closer = self.nested(self.members, "[", "]")
            return bracket(node, ")" if closer == "[" else "]", "(")
        if value == "<(":
            node = self.nested(self.members, ")>")
            return ("tuple", *node[2:]) if node[0] == "list" else ("tuple", node)
        if value == "{":
            node = self.nested(self.members, "}")
            return ("set", *node[2:]) if node[0] == "list" else node
        if value == "{{":
            return self.braces()
        if value in ("|", "||"):
            return ("abs", self.nested(self.sum, value, bars=1))
        raise Unreadable("unexpected %s" % (value or "end"))

    def braces(self):
        """A set, or set-builder notation: {x | conditions}, {x in S : conditions}."""
        if self.accept("}}"):
            return ("set",)
        stops = [j for j, t in enumerate(self.tokens[self.i:self.i + 8]) if t[1] in ("|", ":", ",")]
        if (self.peek()[0] in ("v", "c") and stops and self.peek(stops[0])[1] != ","
                and (stops[0] == 1 or self.peek(1)[1] == "in")):
            self.i += stops[0] + 1
            node = self.nested(self.members, "}}")
            if node[0] not in ("rel", "list"):
                raise Unreadable("set-builder notation without a condition")
            return node
        node = self.nested(self.members, "}}")
        return ("set", *node[2:]) if node[0] == "list" else ("set", node)

    def number(self, text, tokens=0):
        """A numeral; tokens: how many tokens to step over besides."""
        self.i += tokens
        if len(text) > MAX_DIGITS:
            raise Unreadable("a number of more than %d digits" % MAX_DIGITS)
        if "\\" in text:  # 0.1\overline{6}
            whole, digits, repeat = re.match(r"(\d*)\.(\d*)\\\w+\s*\{(\d+)\}", text).groups()
            period = Fraction(int(repeat), 10**len(repeat) - 1) / 10**len(digits)
            return num(Fraction((whole or "0") + "." + (digits or "0")) + period)
        if self.accept("_"):
            base = self.subscript()
            base = str(NUMERALS.get(base, base))
            if not re.fullmatch(r"[1-3]?\d", base) or not 2 <= int(base) <= 36 or not text.isalnum() or (
                    any(int(digit, 36) >= int(base) for digit in text)):
                raise Unreadable("%s is not a number in base %s" % (text, base))
            return ("base", num(int(text, int(base))), text)
        mantissa, _, exponent = text.lower().partition("e")
        if len(exponent) > 4 or not re.fullmatch(r"[\d.]+", mantissa):
            raise Unreadable("%s is past the limits of a number" % text)
        return num(Fraction(mantissa) * Fraction(10)**int(exponent or 0))

    def command(self, name):
        if name in REFUSED or not name.isalpha():
            raise Unreadable("\\%s is not supported" % name)
        if name in ("frac", "binom"):
            top = self.argument()
            return ("div" if name == "frac" else "binom", top, self.argument())
        if name == "sqrt":
            degree = self.nested(self.members, "]") if self.accept("[") else num(2)
            if self.accept("("):
                return ("root", self.nested(self.members, ")"), degree)
            return ("root", self.atom() if self.peek()[0] == "n" else self.argument(), degree)
        if name in NAMED:
            return self.function(name)
        if name in ("lfloor", "lceil"):
            node, _ = self.nested(self.members, "rfloor", "rceil")
            return (name[1:], node)
        if name == "Interval":
            self.expect("(")
            return bracket(self.nested(self.members, ")"), "]", "[")
        if name in ACCENTS:
            start = self.i
            inner = self.argument()
            text = "".join(t[1] for t in self.tokens[start:self.i] if t[1] not in ("{", "}"))
            return inner if name == "vec" or inner[0] == "num" else self.symbol("%s(%s)" % (name, text))
        if name == "begin":
            return self.environment()
        if name == "pi" and self.value() != "_":
            return ("const", "pi")
        return INFINITY if name == "infty" else ("set",) if name == "emptyset" else self.symbol(name)

    def function(self, name):
        power = base = None
        while op := self.accept("^", "_"):
            if op == "^":
                power = self.script()
            else:
                base = self.script()
        if power == num(-1) and "arc" + name in FUNCTIONS:
            name, power = "arc" + name, None
        if self.value() in PAIRS:
            inner = self.nested(self.members, PAIRS[self.accept(*PAIRS)])
        else:
            inner = self.nested(self.bare_argument)
        if base and name != "log":
            raise Unreadable("a subscript on %s" % name)
        if name in OPAQUE:
            node = ("app", name, *(members_of(inner) if inner[0] in ("list", "set", "tuple") else (inner,)))
        elif name == "sqrt":
            node = ("root", inner, num(2))
        elif name == "exp":
            node = ("pow", E, inner)
        elif name in ("log", "ln", "lg"):
            node = ("log", inner, base or {"log": ("const", "log"), "ln": E, "lg": num(10)}[name])
        else:
            node = ("fn", name, inner) if name in TRIGONOMETRIC else (name, inner)
        return ("pow", node, power) if power else node

    def bare_argument(self):
        """sin 2x cos x: the argument ends before the next function, bracket or operator."""
        sign, inner = self.accept("-"), self.factor()
        while (self.starts_factor() and self.peek()[0] != "t" and self.value() not in NAMED
               and self.value() not in ("(", "{{", "|", "||", "<(")):
            inner = scale(inner, self.factor())
        return negative(inner) if sign else inner

    def environment(self):
        """\\begin{pmatrix} and the like: a matrix; cases and aligned lines: a list, or a set of rows."""
        name = self.subscript().strip("*")
        if name not in ENVIRONMENTS:
            raise Unreadable("\\begin{%s} is not supported" % name)
        if name == "array" and self.value() in ("{", "["):  # its columns
            while self.peek()[0] != "end" and self.tokens[self.i][1] not in ("}", "]"):
                self.i += 1
            self.i += 1
        rows = self.nested(self.rows, "end")
        if self.subscript().strip("*") != name:
            raise Unreadable("unbalanced environment")
        lines = all(len(row) == 2 for row in rows) and any(row[1][0] == "rel" for row in rows)
        if name.endswith("matrix") or name == "array" and not lines:
            return ("matrix", *rows)
        if all(len(row) == 2 for row in rows):
            return rows[0][1] if len(rows) == 1 else ("list", ",", *(row[1] for row in rows))
        return ("set", *rows)

    def rows(self):
        rows, row = [], []
        while self.value() != "end":
            while self.peek()[0] == "t" and self.peek()[1] in QUALIFIERS:  # "if", before a condition
                self.i += 1
            if self.value() not in ("&", "newline"):
                row.append(self.relation())
                self.accept(",")
            if not self.accept("&") and self.value() != "end":
                self.expect("newline")
                rows += [("row", *row)] if row else []
                row = []
        return rows + ([("row", *row)] if row else [])


def bracket(node, closer, opener):
    """( ... ): a group or a tuple; with a square bracket and two members, an interval."""
    if node[0] != "list":
        return node if opener + closer == "()" else ("tuple", node)
    if opener + closer == "()" or len(node) != 4:
        return ("tuple", *node[2:])
    return ("interval", *node[2:], opener + closer)


# Values: exact fractions where possible, else complex balls: a centre of 60 digits and a bound on its error.

CONTEXT = decimal.Context(prec=60, Emin=-10**6, Emax=10**6, traps=[
    decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow])
ZERO, ONE, EPS, TINY = Decimal(0), Decimal(1), Decimal("1e-58"), Decimal("1e-66")
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
EULER = Decimal("2.71828182845904523536028747135266249775724709369995957496696763")


class Ball:
    __slots__ = ("re", "im", "err")

    def __init__(self, re, im=ZERO, err=ZERO):
        self.re, self.im, self.err = re, im, err

    def size(self):
        return max(abs(self.re), abs(self.im))

    def real(self):
        return abs(self.im) <= self.err

    def zero(self):
        return self.size() <= 4 * self.err


def ball(x):
    if isinstance(x, Ball):
        return x
    re = Decimal(x.numerator) / Decimal(x.denominator)
    return Ball(re, ZERO, abs(re) * EPS)


def both_exact(a, b):
    return isinstance(a, Fraction) and isinstance(b, Fraction)


def exact(x):
    if max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
        raise Undefined("a number of more than %d bits" % MAX_BITS)
    return x


def add(a, b):
    if both_exact(a, b):
        return exact(a + b)
    a, b = ball(a), ball(b)
    return Ball(a.re + b.re, a.im + b.im, a.err + b.err + EPS * (a.size() + b.size()))


def mul(a, b):
    if both_exact(a, b):
        return exact(a * b)
    a, b = ball(a), ball(b)
    x, y = a.size(), b.size()
    err = 2 * (x * b.err + y * a.err + a.err * b.err + EPS * x * y)
    if not a.im and not b.im:
        return Ball(a.re * b.re, ZERO, err)
    return Ball(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re, err)


def minus(a):
    return mul(Fraction(-1), a)


def inverse(a):
    if a == 0 if isinstance(a, Fraction) else a.zero():
        raise Undefined("division by zero")
    if isinstance(a, Fraction):
        return 1 / a
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
    if a.zero():
        raise Undefined("the logarithm of zero")
    if not a.im and a.re > 0:
        re, im = a.re.ln(), ZERO
    else:
        re, im = (a.re * a.re + a.im * a.im).ln() / 2, angle(a)
    return Ball(re, im, 2 * a.err / a.size() + EPS * (1 + abs(re)))


def sine_cosine(x):
    """Taylor series, after reduction to [-pi, pi] and three halvings."""
    if abs(x) > 10**15:
        raise Undefined("the sine of a huge number")
    x = (x - (x / (2 * PI)).to_integral_value() * 2 * PI) / 8
    sine, cosine, term, n = x, ONE, x, 1
    while abs(term) > TINY:
        term = term * x / (n + 1)
        cosine += -term if n % 4 == 1 else term
        term = term * x / (n + 2)
        sine += -term if n % 4 == 1 else term
        n += 2
    for _ in range(3):
        sine, cosine = 2 * sine * cosine, 1 - 2 * sine * sine
    return sine, cosine


def arctan(x):
    """Taylor series after four halvings of the angle."""
    for _ in range(4):
        x = x / (1 + (1 + x * x).sqrt())
    total, term, n = x, x, 1
    while abs(term) > TINY:
        term, n = -term * x * x, n + 2
        total += term / n
    return 16 * total


def angle(a):
    if abs(a.im) <= a.err:
        return ZERO if a.re > 0 else +PI
    if abs(a.re) < abs(a.im):
        return (PI / 2).copy_sign(a.im) - arctan(a.re / a.im)
    return arctan(a.im / a.re) + (ZERO if a.re > 0 else PI.copy_sign(a.im))


def integer(a):
    """The integer that a number is, or None."""
    if isinstance(a, Fraction):
        return a.numerator if a.denominator == 1 else None
    nearest = a.re.to_integral_value()
    whole = a.real() and abs(a.re - nearest) <= a.err < Decimal("1e-20") and abs(nearest) < 10**20
    return int(nearest) if whole else None


def positive(a):
    return a > 0 if isinstance(a, Fraction) else a.real() and a.re > a.err


def exact_root(x, q):
    """The q-th root of an integer x >= 0 if it is an integer, else None."""
    if q > 2 and x.bit_length() > 900:
        return None
    root = math.isqrt(x) if q == 2 else round(x ** (1 / q))
    return root if root**q == x else None


def power(a, b, real):
    """a ** b; with real, undefined where it is not real.  Odd roots of negative numbers are the real ones."""
    if both_exact(a, b):
        return exact_power(a, b, real)
    n = b.numerator if isinstance(b, Fraction) and b.denominator == 1 else None
    if n is not None and abs(n) <= 1000:
        result, base = Fraction(1), a if n >= 0 else inverse(a)
        for bit in bin(abs(n))[2:]:
            result = mul(result, result)
            result = mul(result, base) if bit == "1" else result
        return result
    if positive(a) or not real and not ball(a).zero() and n is None and b != Fraction(1, 3):
        return exp(mul(b, log(a)))
    a, b = ball(a), ball(b)
    if a.zero() and positive(b) and b.re <= 1 and a.err < Decimal("1e-40"):
        return Ball(ZERO, ZERO, (8 * a.err)**b.re + EPS)
    if a.real() and a.re < -a.err and b.real():
        for q in (3, 5, 7):
            p = integer(mul(b, Fraction(q)))
            if p is not None:
                root = exp(mul(b, log(minus(a))))
                return root if p % 2 == 0 else minus(root)
    raise Undefined("a power of zero or of a negative number")


def exact_power(a, b, real):
    p, q = b.numerator, b.denominator
    if not a and p <= 0:
        if p:
            raise Undefined("division by zero")
        return Fraction(1)
    if q == 1:
        bits = max(a.numerator.bit_length(), a.denominator.bit_length())
        if bits > 1 and bits * abs(p) > MAX_BITS:
            raise Undefined("a power of more than %d bits" % MAX_BITS)
        return a**p if bits > 1 else a if p % 2 else a * a
    top, bottom = (exact_root(abs(n), q) if q < 1000 else None for n in (a.numerator, a.denominator))
    if top is not None and bottom is not None:
        root = exact_power(Fraction(top, bottom), Fraction(p), real)
    else:
        root = exp(mul(b, log(abs(a))))
    if a >= 0:
        return root
    if q % 2:
        return minus(root) if p % 2 else root
    if real:
        raise Undefined("an even root of a negative number")
    return mul(root, exp(mul(Ball(ZERO, PI, EPS), b)) if q > 2 else Ball(ZERO, ONE if p % 4 == 1 else -ONE))


def trigonometric(name, a):
    a = ball(a)
    if name.startswith("arc"):
        if not a.real():
            raise Undefined("%s of a complex number" % name)
        if name in ("arcsec", "arccsc", "arccot"):
            twin = {"arcsec": "arccos", "arccsc": "arcsin", "arccot": "arctan"}[name]
            return trigonometric(twin, inverse(a))
        if name == "arctan":
            return Ball(arctan(a.re), ZERO, a.err + EPS)
        rest = 1 - a.re * a.re
        if rest < -4 * a.err - EPS:
            raise Undefined("outside the domain of %s" % name)
        if rest <= 4 * a.err + EPS:  # the end of the domain
            value, err = (PI / 2).copy_sign(a.re), (8 * (a.err + EPS)).sqrt()
        else:
            value, err = arctan(a.re / rest.sqrt()), 2 * (a.err + EPS) / rest.sqrt() + EPS
        return Ball(value if name == "arcsin" else PI / 2 - value, ZERO, err)
    if name.endswith("h") or a.im:
        turn = ONE if name.endswith("h") else None
        up = exp(a if turn else mul(a, Ball(ZERO, ONE)))
        down = inverse(up)
        cosine = mul(add(up, down), Fraction(1, 2))
        sine = mul(add(up, minus(down)), Fraction(1, 2) if turn else Ball(ZERO, Decimal("-0.5")))
    else:
        err = a.err + EPS * (10 + abs(a.re))
        sine, cosine = (Ball(v, ZERO, err) for v in sine_cosine(a.re))
    name = name.rstrip("h")
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
    value = Fraction(rng.randint(*((1, 90), (100, 400), (300, 1200))[attempt % 3]), 97)
    return -value if mode == "signed" and attempt % 4 in (1, 2) else value


RADIANS = Ball(CONTEXT.divide(PI, Decimal(180)), ZERO, EPS)
CONSTANTS = {"pi": Ball(PI, ZERO, EPS), "e": Ball(EULER, ZERO, EPS), "i": Ball(ZERO, ONE)}


class Comparison:
    """Evaluation at a point, then equality by type, symmetric; keeps count of the work that is left."""

    def __init__(self):
        self.work = MAX_WORK
        self.attempt = self.mode = None  # the sample point, if any
        self.real = False  # is a complex value undefined?
        self.degree, self.percent, self.log_base = Fraction(1), Fraction(1), E  # what the marks mean

    def spend(self, work):
        self.work -= work
        if self.work < 0:
            raise Undefined("more than %d steps of work" % MAX_WORK)

    def constant(self, node):
        self.attempt, self.real = None, False
        return self.evaluate(node)

    def evaluate(self, node):
        """A Fraction or a Ball; Undefined where the node has no value."""
        kind = node[0]
        self.spend(1)
        if kind == "num":
            return node[1]
        if kind in ("sym", "text"):
            if self.attempt is None:
                raise Undefined("%s has no value" % node[1])
            return sample(node[1], self.attempt, self.mode)
        if kind == "const":
            if node == INFINITY:
                raise Undefined("infinity is not a number")
            return self.evaluate(self.log_base) if node[1] == "log" else CONSTANTS[node[1]]
        if kind == "fn":
            self.spend(30)
            degree, self.degree = self.degree, RADIANS
            try:
                return trigonometric(node[1], self.evaluate(node[2]))
            finally:
                self.degree = degree
        if kind == "app":
            return self.opaque(node[1], [self.evaluate(c) if isinstance(c, tuple) else c for c in node[2:]])
        if kind in COMPOUND or kind == "sign":
            raise Undefined("a %s is not a number" % kind)
        values = [self.evaluate(c) for c in node[1:] if isinstance(c, tuple)]
        for v in values:
            bits = v.numerator.bit_length() + v.denominator.bit_length() if isinstance(v, Fraction) else 0
            self.spend(2 + bits * bits // 2**20)
        a, b = values[0], values[-1]
        if kind == "add":
            return functools.reduce(add, values)
        if kind == "mul":
            return functools.reduce(mul, values)
        if kind in ("unit", "base"):
            return a
        if kind == "div" or kind == "ratio" and len(values) == 2:
            return mul(a, inverse(b))
        if kind == "deg":
            return mul(a, self.degree)
        if kind == "pct":
            return mul(a, self.percent)
        if kind in ("pow", "root"):
            self.spend(30)
            b = inverse(b) if kind == "root" else b
            return exp(b) if node[1] == E else power(a, b, self.real)
        if kind == "log":
            self.spend(60)
            if self.real and not positive(a):
                raise Undefined("the logarithm of a negative number")
            return log(a) if node[2] == E else mul(log(a), inverse(log(b)))
        if kind == "abs":
            if isinstance(a, Fraction):
                return abs(a)
            size = (a.re * a.re + a.im * a.im).sqrt() if a.im else abs(a.re)
            return Ball(size, ZERO, 2 * a.err + EPS * size)
        if kind in ("floor", "ceil"):
            whole = integer(a)
            if whole is None and (not ball(a).real() or abs(ball(a).re) > 10**40):
                raise Undefined("the %s of that number" % kind)
            if whole is None:
                whole = getattr(math, kind)(a if isinstance(a, Fraction) else a.re)
            return Fraction(whole)
        n, k = integer(a), integer(b)
        if n is None or k is None or not 0 <= n <= MAX_FACTORIAL or k < 0:
            raise Undefined("a factorial outside 0 to %d" % MAX_FACTORIAL)
        self.spend(n)
        return Fraction(math.comb(n, k) if kind == "binom" else
                        math.factorial(n) if kind == "factorial" else math.prod(range(n, 0, -2)))

    def opaque(self, name, args):
        """A function that nobody defined: some value that depends on its name and arguments alone."""
        if args and all(isinstance(a, Fraction) for a in args):
            if name in ("max", "min"):
                return max(args) if name == "max" else min(args)
            if all(a.denominator == 1 for a in args):
                if name in ("gcd", "lcm"):
                    return exact(Fraction((math.gcd if name == "gcd" else math.lcm)(*map(int, args))))
                if name == "C" and len(args) == 2:
                    return self.evaluate(("binom", *map(num, args)))
        if self.attempt is None:
            raise Undefined("%s has no value" % name)
        shown = [a if isinstance(a, str) else "%.30e %.30e" % (ball(a).re, ball(a).im) for a in args]
        return sample("%s(%s)" % (name, ",".join(shown)), self.attempt, self.mode)

    def same_number(self, a, b):
        if both_exact(a, b):
            return a == b
        a, b = ball(a), ball(b)
        err, size = a.err + b.err, a.size() + b.size()
        gap = max(abs(a.re - b.re), abs(a.im - b.im))
        return gap <= 4 * err + EPS * size and err <= Decimal("1e-30") * max(size, Decimal("1e-5"))

    def order(self, a, b):
        """-1, 0 or 1 for real numbers and float infinities."""
        if isinstance(a, float) or isinstance(b, float):
            a, b = (n if isinstance(n, float) else 0 for n in (a, b))
            return (a > b) - (a < b)
        return 0 if self.same_number(a, b) else 1 if ball(a).re > ball(b).re else -1

    def in_some_mode(self, a, b, test):
        """Try the readings of degree, percent and bare log signs, the same for both sides."""
        found = {n if n[0] == "const" else n[0] for node in (a, b) for n in walk(node)}
        equal = False
        for self.degree, self.percent, self.log_base in itertools.product(
                [Fraction(1), RADIANS][:1 + ("deg" in found)],
                [Fraction(1), Fraction(1, 100)][:1 + ("pct" in found)],
                [E, num(10)][:1 + (("const", "log") in found)]):
            equal = equal or test()
        self.degree, self.percent, self.log_base = Fraction(1), Fraction(1), E
        return equal

    def points(self, a, b):
        """Pairs of values at up to six sample points where both are defined; one pair without symbols."""
        names, nodes = symbols(a, b), [*walk(a), *walk(b)]
        kinds = {n[0] for n in nodes}
        whole = kinds & {"factorial", "double_factorial", "binom", "floor", "ceil"} or any(
            n[0] == "pow" and n[1][0] == "num" and n[1][1] < 0 and symbols(n[2]) for n in nodes)
        self.mode = "integer" if whole else "signed" if len(names) == 1 or "abs" in kinds else "positive"
        found = 0
        for attempt in range(24) if names else [None]:
            self.attempt, self.real = attempt, bool(names) and I not in nodes
            try:
                values = self.evaluate(a), self.evaluate(b)
            except ArithmeticError:
                if self.work < 0:
                    raise
                continue
            yield values
            found += 1
            if found == 6:
                return

    def same_expression(self, a, b):
        if infinite(a) or infinite(b):
            return infinite(a) == infinite(b)

        def test():
            count = 0
            for x, y in self.points(a, b):
                if not self.same_number(x, y):
                    return False
                count += 1
            return count >= (3 if symbols(a, b) else 1)
        return self.in_some_mode(a, b, test)

    def proportional(self, a, b, positively):
        """Is a a non-zero (a positive) multiple of b?"""
        def test():
            factors = []
            for x, y in self.points(a, b):
                try:
                    inverse(x)
                    factors.append(mul(x, inverse(y)))
                except ArithmeticError:
                    return False
                if not self.same_number(factors[0], factors[-1]) or positively and not positive(factors[0]):
                    return False
            return len(factors) >= 3
        return self.in_some_mode(a, b, test)

    def equal(self, a, b):
        if a == b:
            return True
        self.spend(5)
        if "family" in (a[0], b[0]):
            if a[0] == b[0]:
                a, b = (("family", substitute(n[1], {n[2]: ("sym", "#")})) for n in (a, b))
            return self.equal(*(n[1] if n[0] == "family" else n for n in (a, b)))
        if has_sign(a) or has_sign(b):
            return any(self.equal(x, y) for x, y in itertools.product(branches(a), branches(b)))
        if "unit" in (a[0], b[0]):
            return self.same_quantity(a, b)
        a, b = conditions(a), conditions(b)
        for x, y in ((a, b), (b, a)):
            if x[0] == "rel" and set(x[1].split()) <= {"=", "~", "equiv"} and (y[0] != "rel" or "~" in x[1]):
                if self.consistent(x) and any(self.equal(v, y) for v in readings(x)):
                    return True
                if y[0] not in ("rel", "list", "tuple"):
                    return False
            if x[0] == "rel" and x[1] == "in" and y[0] != "rel":
                return self.equal(x[3], y)
        if a[0] == b[0] == "rel":
            return self.same_relation(a, b)
        if {a[0], b[0]} & REAL_SETS and self.same_set(self.real_set(a), self.real_set(b)):
            return True
        if "interval" in (a[0], b[0]):  # also with symbols for ends
            a, b = as_interval(a), as_interval(b)
            return bool(a and b) and a[3] == b[3] and self.equal(a[1], b[1]) and self.equal(a[2], b[2])
        a, b = (("tuple", *n[2:]) if n[0] == "app" and m[0] == "tuple" and n[1].isupper() else n
                for n, m in ((a, b), (b, a)))  # the point A(1, 2)
        kinds = {a[0], b[0]}
        if kinds <= {"list", "set"}:
            return self.same_members(a, b)
        for x, y in ((a, b), (b, a)):
            if x[0] == "set" and len(x) == 2:
                return self.equal(x[1], y)
        if kinds == {"matrix"} or kinds & {"tuple", "row"} and kinds <= {"tuple", "row", "list", "matrix"}:
            x, y = (n[1:] if len(kinds) == 1 else members_of(n) for n in (a, b))
            return len(x) == len(y) > 0 and all(map(self.equal, x, y))
        if kinds & COMPOUND:
            return a[0] == b[0] and a[0] in ("cup", "cap", "setminus") and len(a) == len(b) and all(
                map(self.equal, a[1:], b[1:]))
        if a[0] == b[0] == "ratio" and len(a) == len(b) > 3:
            return all(self.same_expression(("div", x, a[1]), ("div", y, b[1])) for x, y in zip(a[2:], b[2:]))
        if "base" in kinds and len(kinds) == 2:  # 52_8 and 52, where the question names the base
            x, y = (a, b) if a[0] == "base" else (b, a)
            return y[0] == "num" and str(y[1]) == x[2]
        return a[1] == b[1] if kinds == {"text"} else self.same_expression(a, b)

    def same_quantity(self, a, b):
        """Units are optional, but two units of one dimension count."""
        names = [n[2] if n[0] == "unit" else "" for n in (a, b)]
        a, b = (n[1] if n[0] == "unit" else n for n in (a, b))
        x, y = map(measure, names)
        if all(n.startswith("mod ") for n in names) and names[0] != names[1]:
            return False
        if x and y and x[0] == y[0] and x[1] != y[1]:
            return not x[0].startswith("clock") and self.equal(scale(num(x[1]), a), scale(num(y[1]), b))
        return self.equal(a, b)

    def same_members(self, a, b):
        """In any order, equally many; repeated members of sets and repeated points count once."""
        x, y = members_of(a), members_of(b)
        if "set" in (a[0], b[0]) or all(n[0] == "tuple" for n in x + y):
            x, y = list(dict.fromkeys(x)), list(dict.fromkeys(y))
        if len(x) != len(y):
            return False
        for m in x:
            found = next((i for i, n in enumerate(y) if self.equal(m, n)), None)
            if found is None:
                return False
            del y[found]
        return True

    def consistent(self, rel):
        """Do the sides of a chain that are not labels agree?  After ~ stands a rounding."""
        values = [s for s in rel[2:] if not label(s)]
        if "~" in rel[1] and len(values) > 1:
            exact_value, rounded = (self.constant(v) for v in values[-2:])
            if "~" in rel[1][:-1] or not isinstance(rounded, Fraction):
                return False
            places = next((k for k in range(30) if (rounded * 10**k).denominator == 1), 30)
            unit = Decimal(10)**-places if abs(rounded) < 10**6 else ball(rounded).size() / 100
            gap = add(exact_value, minus(rounded))
            if not ball(gap).real() or abs(ball(gap).re) > unit * Decimal("0.51"):
                return False
            values.pop()
        return all(map(self.equal, values, values[1:]))

    def same_relation(self, a, b):
        (ops, x), (other_ops, y) = ascending(a), ascending(b)
        if ops == other_ops and len(x) == len(y) and all(map(self.equal, x, y)):
            return True
        if ops == other_ops == "=":
            if self.same_definition(x, y):
                return True
        elif {ops, other_ops} == {"=", "~"}:
            u, v = readings(a), readings(b)
            return bool(u and v) and x[0] == y[0] and label(x[0]) and self.equal(u[0], v[0])
        elif symbols(a) == symbols(b) and self.same_set(self.real_set(a), self.real_set(b)):
            return True
        if ops == other_ops and len(x) == len(y) == 2 and not COMPOUND & {n[0] for s in (a, b) for c in s[2:]
                                                                          for n in walk(c)}:
            return self.proportional(difference(x), difference(y), ops in ("<", "<="))
        return False

    def same_definition(self, x, y):
        """f(x) = ... and f(z) = ..., a_n = ... and a_k = ...: the same up to the parameters' names."""
        (name, params), (other, others) = parameters(x[0]), parameters(y[0])
        if not name or not other or len(params) != len(others):
            return label(x[0]) and label(y[0]) and compatible(x[0], y[0]) and self.equal(x[1], y[1])
        marks = [("sym", "#%d" % i) for i in range(len(params))]
        x, y = substitute(x[1], dict(zip(params, marks))), substitute(y[1], dict(zip(others, marks)))
        return name == other and self.equal(x, y)

    # Sets of reals: sorted disjoint pieces (low, low closed?, high, high closed?) with float infinities.

    def endpoint(self, node):
        if infinite(node):
            return infinite(node)
        try:
            value = self.constant(node)
        except ArithmeticError:
            return None
        return value if isinstance(value, Fraction) or value.real() else None

    def real_set(self, node):
        """The pieces of a set of reals, or None if the node is no such set."""
        kind = node[0]
        if kind == "interval" or kind == "tuple" and len(node) == 3:
            low, high, ends = self.endpoint(node[1]), self.endpoint(node[2]), (*node, "()")[3]
            if low is None or high is None or self.order(low, high) > (0 if ends == "[]" else -1):
                return None
            return [(low, ends[0] == "[", high, ends[1] == "]")]
        if kind == "set":
            ends = [self.endpoint(n) for n in node[1:]]
            return None if None in ends or not ends else self.union([(e, True, e, True) for e in ends])
        if node in (("sym", "R"), ("text", "all real numbers"), ("text", "all reals")):
            return REALS
        if kind in ("cup", "cap", "setminus"):
            parts = [self.real_set(n) for n in node[1:]]
            if None in parts:
                return None
            if kind == "cup":
                return self.union(sum(parts, []))
            return self.intersection(parts[0], parts[1] if kind == "cap" else self.complement(parts[1]))
        if kind == "condition":
            parts = [self.real_set(n) for n in node[2:]]
            if None in parts:
                return None
            both = functools.reduce(self.intersection, parts)
            return self.union(sum(parts, [])) if node[1] == "or" or not both else both
        return self.solve(node) if kind == "rel" else None

    def solve(self, node):
        """The solutions of a chain of linear inequalities in one unknown (a symbol, or the likes of f(x))."""
        unknown = {s for s in node[2:] if simple_label(s)} or {("sym", name) for name in symbols(node)}
        if len(unknown) != 1:
            return None
        name, pieces = unknown.pop(), REALS
        for op, left, right in zip(node[1].split(), node[2:], node[3:]):
            if op == "in":
                part = self.real_set(right) if left == name else None
            else:
                part = self.half_line(op, left, right, name)
            if part is None:
                return None
            pieces = self.intersection(pieces, part)
        return pieces

    def half_line(self, op, left, right, name):
        if op not in ("<", ">", "<=", ">=", "!=", "="):
            return None
        if right[0] == "abs":
            left, right, op = right, left, flip(op)
        if left[0] == "abs" and op[0] in "<>" and not symbols(right):  # |u| < c is u < c and -c < u
            parts = [self.half_line(op, left[1], right, name),
                     self.half_line(flip(op), left[1], negative(right), name)]
            if None in parts:
                return None
            return self.intersection(*parts) if op[0] == "<" else self.union(sum(parts, []))
        if infinite(left) or infinite(right):
            return REALS if name in (left, right) and op in ("<", ">") else None
        line = ("add", left, negative(right))
        try:
            start, one, two, five = (self.constant(substitute(line, {name: num(x)})) for x in (0, 1, 2, 5))
            slope = add(one, minus(start))
            for x, value in ((2, two), (5, five)):
                if not self.same_number(add(mul(Fraction(x), slope), start), value):
                    return None
            bound = minus(mul(start, inverse(slope)))
        except ArithmeticError:
            return None
        if op in ("=", "!="):
            point = [(bound, True, bound, True)]
            return point if op == "=" else self.complement(point)
        closed = op.endswith("=")
        if (op[0] == "<") == positive(slope):
            return [(-math.inf, False, bound, closed)]
        return [(bound, closed, math.inf, False)]

    def union(self, pieces):
        merged = []
        by_start = functools.cmp_to_key(lambda p, q: self.order(p[0], q[0]) or q[1] - p[1])
        for piece in sorted(pieces, key=by_start):
            low, low_closed, high, high_closed = piece
            gap = self.order(low, merged[-1][2]) if merged else 1
            if gap < 0 or gap == 0 and (low_closed or merged[-1][3]):
                before = merged.pop()
                further = self.order(high, before[2])
                closed = high_closed if further > 0 else before[3] or further == 0 and high_closed
                piece = (*before[:2], high if further > 0 else before[2], closed)
            merged.append(piece)
        return merged

    def complement(self, pieces):
        found, low, closed = [], -math.inf, False
        for piece in pieces:
            width = self.order(low, piece[0])
            if width < 0 or width == 0 and closed and not piece[1]:
                found.append((low, closed, piece[0], not piece[1]))
            low, closed = piece[2], not piece[3]
        return found + ([(low, closed, math.inf, False)] if low != math.inf else [])

    def intersection(self, a, b):
        return self.complement(self.union(self.complement(a) + self.complement(b)))

    def same_set(self, a, b):
        return a is not None and b is not None and len(a) == len(b) and all(
            (p[1], p[3]) == (q[1], q[3]) and self.order(p[0], q[0]) == self.order(p[2], q[2]) == 0
            for p, q in zip(a, b))


REALS = [(-math.inf, False, math.inf, False)]
REAL_SETS = {"interval", "cup", "cap", "setminus", "condition", "rel", "sym", "text"}


def infinite(node):
    """inf, -inf, or 0.0 for a finite node."""
    return math.inf if node == INFINITY else -math.inf if node == negative(INFINITY) else 0.0


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
        members = members_of(node)
        return [(*node[:len(node) - len(members)], *itertools.chain(*(
            m[2:] if has_sign(n) else (m,) for m, n in zip(choice, members))))
            for choice in itertools.product(*map(branches, members))]
    tied = [substitute(node, {s: num(s[2] * t) for s in signs}) for t in (1, -1)]
    free = [substitute(node, dict(zip(signs, map(num, choice))))
            for choice in itertools.product((1, -1), repeat=len(signs))]
    return [("list", "or", *tied), ("list", "or", *free)][:len(signs)]


def conditions(node):
    """Inequalities in one unknown that stand in a list are one set of reals."""
    if node[0] == "list" and all(n[0] == "rel" for n in node[2:]) and any(n[1] != "=" for n in node[2:]):
        if len(symbols(node)) == 1:
            return ("condition", *node[1:])
    return node


def singular(unit):
    return unit[:-1] if unit not in UNITS and unit.endswith("s") else unit


def measure(unit):
    """(dimension, size) of a known unit, also squared or cubed ('square cm', 'cm ^2'), else None."""
    match = re.fullmatch(r"(?:(square|sq|cubic) )?(\S+?)(?: \^([23]))?", unit)
    if not match or singular(match[2]) not in UNITS:
        return None
    power = int(match[3] or {None: 1, "cubic": 3}.get(match[1], 2))
    dimension, size = UNITS[singular(match[2])]
    return "%s^%d" % (dimension, power), size**power


def flip(ops):
    return " ".join(o.translate(str.maketrans("<>", "><")) for o in reversed(ops.split()))


def ascending(rel):
    """(operators, sides) of a relation, turned round if it descends."""
    ops, sides = rel[1], rel[2:]
    return (flip(ops), sides[::-1]) if set(ops.split()) <= {">", ">="} else (ops, sides)


def as_interval(node):
    """a < x < b and (a, b) as an interval, whose ends may hold other symbols."""
    if node[0] == "rel":
        ops, sides = ascending(node)
        if ops.split()[0] in ("<", "<=") and len(sides) == 3 and simple_label(sides[1]) and (
                ops.split()[1] in ("<", "<=") and not symbols(sides[1]) & symbols(sides[0], sides[2])):
            return ("interval", sides[0], sides[2], "(["[ops[1:2] == "="] + ")]"[ops.endswith("=")])
    if node[0] == "tuple" and len(node) == 3:
        return ("interval", *node[1:], "()")
    return node if node[0] == "interval" else None


def difference(sides):
    """left - right, times those denominators of its terms that hold symbols: y = 1/x is xy = 1."""
    terms = [t for side in sides for t in (side[1:] if side[0] in ("add", "mul") else [side])]
    below = dict.fromkeys(t[2] for t in terms if t[0] == "div" and symbols(t[2]))
    return ("mul", ("add", sides[0], negative(sides[1])), *below)


def simple_label(node):
    return node[0] in ("sym", "text", "app", "fn") and bool(symbols(node)) or (
        node[0] == "tuple" and all(map(simple_label, node[1:])))


def label(node):
    """May this side of an equation be the name of what the other side is?  Names, AB, m + n, sin x, a : b."""
    kinds = {n[0] for n in walk(node)}
    return simple_label(node) or bool(symbols(node)) and kinds <= {
        "sym", "text", "app", "mul", "abs", "fn", "ratio", "add", "deg", "log", "const", "div"}


def readings(rel):
    """The value behind the labels of a chain; x = y = 1 may also mean the list 1, 1."""
    sides = rel[2:]
    if "~" in rel[1]:
        return [s for s in sides if not label(s)]
    if not any(map(label, sides)) and not COMPOUND & {s[0] for s in sides}:  # an identity
        return [sides[-1]]
    if len(sides) == 2 and label(sides[1]) and not label(sides[0]):
        sides = sides[::-1]
    first, last = sides[0], sides[-1]
    if symbols(first) and not (simple_label(first) or label(first) and not symbols(last)):
        return []
    if len(sides) > 2 and all(map(simple_label, sides[:-1])):
        return [last, ("list", ",", *[last] * (len(sides) - 1))]
    return [last]


def parameters(node):
    """(name, parameters) of f(x) or a_n, else (None, ())."""
    if node[0] == "app" and len(node) > 2 and all(isinstance(c, tuple) and c[0] == "sym" for c in node[2:]):
        return node[1], node[2:]
    if node[0] == "sym" and re.fullmatch("[^_]+_[A-Za-z]", node[1]):
        return node[1][:-2], (("sym", node[1][-1]),)
    return None, ()


def compatible(a, b):
    """May two labels name one quantity?  m and m_max, S and S_n, y and f(x)."""
    if "text" in (a[0], b[0]) or {a[0], b[0]} == {"app", "sym"} and ("sym", "y") in (a, b):
        return True
    a, b = (n[1].split("_")[0].lower() if n[0] in ("sym", "app") else n for n in (a, b))
    return a == b


# Verdicts.

class Reading:
    """One side: its tokens, the nodes that they can mean or the problem with them, and its choice letter."""

    def __init__(self, text):
        self.nodes, self.tokens, self.problem = [], [], "an empty answer"
        self.choice = self.rest = None
        if len(text) > MAX_CHARS:
            self.problem = "more than %d characters" % MAX_CHARS
            return
        text = clean(text)
        variants = [(text, True)]
        grouped = GROUPED.sub(lambda m: m[0] if inside(text[:m.start()]) else m[0].replace(",", ""), text)
        if grouped != text:  # 1,234 is a number or a list
            variants.insert(0, (grouped, True))
        if re.search(r"\d[eE]-\d", text):  # 2e-3 is a number or 2e - 3
            variants.append((text, False))
        for variant, scientific in variants:
            try:
                tokens = tokenize(variant, scientific)
                self.tokens = self.tokens or [t[1] for t in tokens]
                self.nodes.append(Parser(without_remark(tokens)).answer())
            except (Unreadable, RecursionError) as error:
                self.problem = str(error)
        plain = re.sub(r"\\(?:text|textbf|textit|mathrm|mbox)(?![a-z])|[{}$\\]", " ", text).rstrip(". ")
        self.words = [w for w in re.findall(r"[^\W_]+|[^\w\s]", plain.lower()) if w not in ("a", "an", "the")]
        found = CHOICE.match(text)
        if found:
            bare = found.end() >= len(text.rstrip())
            explicit = found[2] == ")" or found[2] and found[1].isupper() or "\\" in found[0]
            if bare and found[1].isupper() or explicit:
                self.choice = found[1].upper()
                self.rest = re.sub(r"^(?:\\[ ,;:]|\\q?quad|\s)*", "", text[found.end():])


CHOICE = re.compile(r"""\s*(?:\\(?:text|textbf|mathrm|mbox)\s*\{)?\s*(?:(?:option|choice)\s+)?\(?\s*
    ((?-i:[A-J])|(?<=\()[a-j])\s*([).:])?\s*\}?(?![A-Za-z0-9^_'])\s*[.)]?\s*""", re.VERBOSE | re.IGNORECASE)


def inside(before):
    """Is a place inside brackets, given the text before it?"""
    return sum(before.count(c) for c in ("(", "[", r"\{")) > sum(before.count(c) for c in (")", "]", r"\}"))


def without_remark(tokens):
    """Without a side remark at the end: 'for all x', 'where k is an integer', '(k in Z)'."""
    depth = 0
    for i, (kind, value, _) in enumerate(tokens):
        if kind == "o" and value in PAIRS:
            if i and depth == 0 and value == "(" and [t[1] for t in tokens[i + 2:i + 3]] == ["in"]:
                return tokens[:i]
            depth += 1
        elif kind == "o" and value in PAIRS.values():
            depth -= 1
        elif i and depth == 0 and (kind == "t" and value in QUALIFIERS or (kind, value) == ("c", "forall")):
            rest = {t[1] for t in tokens[i + 1:]}
            if value in ("if", "when", "for", "as") and {",", "and", "or", "if", "otherwise"} & rest:
                return tokens
            while tokens[i - 1][1] == ",":
                i -= 1
            return tokens[:i]
    return tokens


def verdict(prediction, gold):
    """(equal?, why, prediction's reading, gold's reading)."""
    p, g = Reading(prediction), Reading(gold)
    if not p.tokens or not g.tokens:
        return False, (g if p.tokens else p).problem, p, g
    if p.tokens == g.tokens:
        return True, "the same text", p, g
    if p.choice and g.choice:
        if p.choice != g.choice or not p.rest or not g.rest:
            return p.choice == g.choice, "the choice letters", p, g
        return answers_match(p.rest, g.rest), "the texts of the same choice", p, g
    why = next((side.problem for side in (p, g) if not side.nodes), "different values")
    comparison = Comparison()
    with decimal.localcontext(CONTEXT):
        for a, b in itertools.product(p.nodes, g.nodes):
            try:
                if comparison.equal(a, b):
                    return True, "equal values", p, g
            except (Unreadable, ArithmeticError, RecursionError) as error:
                why = str(error)
    if not p.nodes and not g.nodes:
        return p.words == g.words, "compared as words (%s)" % why, p, g
    for side, other in ((p, gold), (g, prediction)):  # "(C) 12" and "12"
        if side.rest:
            return answers_match(side.rest, other), "the text of the choice", p, g
    return False, why, p, g


def extract_answer(text):
    """Content of the last complete \\boxed{...} or \\fbox{...}, also \\boxed 5; None if missing or empty."""
    answer, opened = None, []  # opened: for each open brace, where the content of its box starts
    for match in BOX.finditer(text):
        if match[1]:
            opened.append(match.end())
        elif match[2]:
            answer = match[2]
        elif match.group() == "{":
            opened.append(None)
        elif match.group() == "}" and opened:
            start = opened.pop()
            answer = answer if start is None else text[start:match.start()]
    return answer and answer.strip() or None


BOX = re.compile(r"\\+(?:boxed|fbox)(?![A-Za-z])\s*(?:(\{)|([^\s${}\\]+)|)|\\.|[{}]", re.DOTALL)


def answers_match(prediction, gold):
    """Are two bare answers (no box around them) equal?  Symmetric; no text makes it raise."""
    return verdict(prediction, gold)[0]


def is_correct(response, gold):
    """Does the last box of a response equal gold, or one of a list of acceptable golds?"""
    answer = extract_answer(response)
    golds = [gold] if isinstance(gold, str) else gold
    return answer is not None and any(answers_match(answer, g) for g in golds)


def explain(prediction, gold):
    """How each side was read and why the verdict is what it is, as three lines of text."""
    equal, why, p, g = verdict(prediction, gold)
    lines = ["%s: %s" % (name, " or ".join(map(show, side.nodes)) or "unreadable (%s)" % side.problem)
             for name, side in (("prediction", p), ("gold", g))]
    return "\n".join([*lines, "%s: %s" % ("equal" if equal else "not equal", why)])


def show(node, depth=0):
    """A node as text: numbers and names as they are, the rest as kind(children)."""
    if not isinstance(node, tuple):
        huge = isinstance(node, Fraction) and max(map(abs, node.as_integer_ratio())) >= 10**40
        text = "a huge number" if huge else str(node)
    elif node[0] in ("num", "sym", "const"):
        text = show(node[1])
    elif depth > 12:
        text = "..."
    else:
        text = "%s(%s)" % (node[0], ", ".join(show(c, depth + 1) for c in node[1:41]))
    return text if len(text) <= 1000 else text[:1000] + "..."


def row_is_correct(row):
    """The verdict on a row: "gold" (string or list) and "prediction" (bare) or "response" (with a box)."""
    golds = [row["gold"]] if isinstance(row["gold"], str) else row["gold"]
    if "response" in row:
        return is_correct(row["response"], golds)
    return any(answers_match(row["prediction"], gold) for gold in golds)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Is a math answer equal to the gold one?")
    parser.add_argument("prediction", nargs="?", help="a bare answer")
    parser.add_argument("gold", nargs="?", help="a bare answer")
    parser.add_argument("--file", help='JSON lines with "gold" (a string or a list) and "prediction" (a bare '
                        'answer) or "response" (a text with a box)')
    args = parser.parse_args(argv)
    if (args.file is None) == (args.gold is None):
        parser.error("give PREDICTION and GOLD, or --file")
    if not args.file:
        print(explain(args.prediction, args.gold))
        return
    verdicts = []
    with open(args.file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                verdicts.append(row_is_correct(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError('%s, line %d: expected an object with strings "gold" and "prediction" or '
                                 '"response": %s' % (args.file, number, error)) from error
            print(json.dumps({"line": number, "correct": verdicts[-1]}))
    print("%d of %d correct" % (sum(verdicts), len(verdicts)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit("error: %s" % error)
