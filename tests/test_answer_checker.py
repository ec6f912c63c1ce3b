r"""What counts as equal, as a table: section, a gold answer, the answers that equal it, answers that do not.

Every row is checked both ways round.  The corpus and the benchmark files have their own file of tests.
"""
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from redi import answer_checker
from redi.answer_checker import RULES, accuracy_reward, answers_match, explain, extract_answer, is_correct

CHECKER = Path(answer_checker.__file__)

TABLE = [
    # section, gold, equal answers, different answers
    ("integers", "25", ["025", "25.0", "+25", r"\boxed{25}", "$25$", r"\(25\)", "25.", r"\text{25}", "{25}", "(25)"],
     ["-25", "2 5", "52", "25 25", "24.999999999999", "25, 25", "25!", "", r"\text{not } 25", "25x"]),
    ("integers", "1000000", ["1,000,000", "1{,}000{,}000", r"1\,000\,000", "1 000 000", "10^6", "1e6",
     r"1 \times 10^{6}", r"1,\!000,\!000", "1 million", r"1 \text{ million}", "１００００００"], ["100,000", "1,000",
     "1 thousand", "1.000.000"]),
    ("integers", "1234", ["1,234", r"\text{1,234}"], ["(1,234)", "1.234", "234, 1"]),
    ("integers", "2", ["two", r"\text{Two}", "2.0", "4/2", r"\sqrt{4}", "5-3"], ["three", "2 or 3", r"2 \pm 1", "ii"]),
    ("fractions", r"\frac{1}{2}", ["1/2", r"\frac12", r"\dfrac{1}{2}", r"\tfrac 12", r"\frac1{2}", "0.5", ".5", "0.50",
     "½", r"\frac{2}{4}", "2^{-1}", r"\frac{-1}{-2}", r"1 \div 2", "50%", r"\cfrac{1}{2}", r"\\frac{1}{2}",
     r"\left(\frac{1}{2}\right)", "1 / 2", '\x0crac{1}{2}'], ["2", "0.51", "0.49999999999", "1/3", "12", "1:3"]),
    ("fractions", r"\frac{1}{3}", [r"0.\overline{3}", r"0.\bar{3}", r"\frac{\frac{1}{3}}{1}", "3^{-1}"], ["0.333",
     "0.33333333333333", "0.3"]),
    ("fractions", r"-\frac{3}{8}", [r"\frac{-3}{8}", r"\frac{3}{-8}", "-0.375", "-3/8", "−3/8"], [r"\frac{3}{8}"]),
    ("mixed numbers", r"1\frac{3}{4}", ["1 3/4", r"\frac{7}{4}", "1.75", r"1 \tfrac34", "1¾", r"1\ \frac{3}{4}",
     r"1\ 3/4"], [r"\frac{3}{4}", "13/4", "1, 3/4"]),
    ("mixed numbers", r"-2\frac{1}{2}", ["-2.5", r"-\frac52"], ["-1.5", "2.5", "-1"]),
    ("scientific", r"4.5 \times 10^{33}", ["4.5e33", "4.5E33", r"4.5\cdot10^{33}", r"45 \times 10^{32}", "4.5*10^33"],
     ["4.5e32", "4.5", r"4.5 \times 10^{-33}"]),
    ("scientific", "0.00001", ["1e-5", "10^{-5}", "1E-05", r"1\times10^{-5}"], ["1e-4", "e-5"]),
    ("percent", "28", [r"28\%", "28%", r"28 \text{ percent}", "28 percent"], ["0.28", "280%", "2.8%"]),
    ("percent", "62.5%", [r"\frac{5}{8}", "0.625", "62.5", r"62\frac12\%"], ["0.62", "6.25", "62%"]),
    ("degrees", r"30^\circ", ["30", "30°", r"30^{\circ}", r"\frac{\pi}{6}", r"30 \text{ degrees}", "30 degrees",
     r"30\degree"], ["60", r"\frac{\pi}{3}", "0.3"]),
    ("degrees", r"\sin 30^\circ", [r"\frac12", r"\sin\frac{\pi}{6}"], [r"\sin 30"]),
    ("degrees", r"90^\circ - \frac{A}{2}", [r"90 - \frac{A}{2}", r"\frac{180^\circ - A}{2}", r"90^\circ - A/2"],
     [r"90^\circ - A"]),
    ("currency", r"\$18.90", ["18.9", "$18.90", r"18.90 \text{ dollars}", "18.90 dollars", r"1890\text{ cents}",
     r"\text{USD } 18.90"], [r"\$1890", "18.09", "£18.90", "18.90 cents"]),
    ("units", r"5 \text{ cm}", ["5", "5cm", "5 cm", r"5\,\mathrm{cm}", r"5\text{ centimeters}", r"50 \text{ mm}",
     r"\text{The length is } 5 \text{ cm}"], ["6 cm", r"5 \text{ m}", "25"]),
    ("units", r"15\mbox{ cm}^2", ["15", r"15 \text{ square centimeters}", r"15\,\mathrm{cm}^{2}"], ["225", "15.2"]),
    ("units", "60 mph", ["60", r"60 \text{ miles per hour}", r"60\ \frac{\text{miles}}{\text{hour}}",
     r"60 \text{ miles/hour}"], ["6"]),
    ("units", r"9.8 \text{ m/s}^2", ["9.8", r"9.8 \, \text{m}/\text{s}^2", r"9.8\ \mathrm{m\,s^{-2}}"], ["9.9", "98"]),
    ("units", "12 apples", ["12", r"12\text{ apples}"], ["13 apples", "apples"]),
    ("units", "2 hours", ["120 minutes", "2", r"2\text{ h}"], ["2 minutes"]),
    ("ordinals", "5", [r"5^{\text{th}}", "5th", r"5\text{th}", "5^{th}"], ["6th"]),
    ("clock times", r"4:30 \text{ p.m.}", ["4:30", "4:30 pm", "4:30 PM", r"4\!:\!30\text{ PM}"], ["4:30 am", "4:31 pm",
     "5:30"]),
    ("ratios", "5:8", [r"\frac58", "10:16", "5 : 8", r"5\colon 8"], ["8:5", "5:6", "5:8:1"]),
    ("ratios", "1:2:3", ["2:4:6", r"\frac12:1:\frac32"], ["1:3:2", "1:2", "123"]),
    ("bases", "204_5", ["204_{5}", r"204_{\text{five}}", "204"], ["206_5", "204_6", "54"]),
    ("bases", "2A_{16}", ["2A_{16}"], ["2B_{16}", "2A_{12}"]),
    ("roots", r"11\sqrt2", [r"11\sqrt{2}", "11 sqrt(2)", "11√2", r"\sqrt{242}", r"\frac{22}{\sqrt{2}}",
     r"11\cdot 2^{1/2}", "11*sqrt(2)"], [r"\sqrt{22}", "15.556", r"11\sqrt{3}", "15.55634918610405", r"2\sqrt{11}"]),
    ("roots", r"\sqrt[3]{-8}", ["-2"], ["2"]),
    ("roots", r"5\sqrt[3]{4}", [r"5\cdot 4^{\frac{1}{3}}", r"\sqrt[3]{500}"], [r"5\sqrt{4}", r"5 \cdot 4^{3}"]),
    ("roots", r"\sqrt{3+2\sqrt{2}}", [r"1+\sqrt2"], [r"1+\sqrt3", "2.414213562373095"]),
    ("roots", "0", [r"\sqrt{2}\sqrt{3}-\sqrt{6}", "-0", "0.0"], [r"\sqrt{2}\sqrt{3}-\sqrt{5}", "10^{-50}",
     r"\sqrt{10^{200}+1}-10^{100}"]),
    ("factorials", r"\frac{1}{2004!}", [r"\frac{2005}{2005!}"], [r"\frac{1}{2006!}", "0"]),
    ("factorials", r"\binom{10}{3}", ["120", r"\frac{10!}{3!7!}", r"\dbinom{10}{7}", "5!"], ["12"]),
    ("factorials", r"\binom{2n}{n}", [r"\frac{(2n)!}{(n!)^2}", r"\frac{(2n)!}{n!n!}"], [r"\frac{(2n)!}{n!}", "2^n"]),
    ("floors", r"\lfloor \log_2 n \rfloor + 1", [r"1+\left\lfloor\log _{2} n\right\rfloor",
     r"\lfloor \log_2 (2n) \rfloor"], [r"\lceil \log_2 n \rceil + 1", r"\log_2 n + 1"]),
    ("logarithms", r"\frac{\log 2}{\log 3}", [r"\frac{\ln 2}{\ln 3}", r"\log_3 2", r"\log_{9} 4"],
     [r"\frac{\ln 3}{\ln 2}", "0.63"]),
    ("logarithms", r"\ln 6", [r"\ln 2 + \ln 3", r"\log_e 6", "ln(6)"], [r"\ln 5", "1.79", r"\log_{10} 6"]),
    ("logarithms", r"\log_{10} 250", [r"1+\log_{10}25", r"\lg 250", r"\log 250"], [r"\log_{10} 25"]),
    ("trigonometry", r"\frac{\sqrt{3}}{2}", [r"\sin \frac{\pi}{3}", r"\cos(\pi/6)", r"\sin 60^\circ", r"\cos 30°"],
     [r"\sin 60", "0.866"]),
    ("trigonometry", r"\arctan 2", [r"\tan^{-1} 2", r"\tan^{-1}(2)", "arctan(2)", r"\frac{\pi}{2}-\arctan\frac12"],
     [r"\arctan 3", r"\frac{1}{\tan 2}"]),
    ("trigonometry", r"\sin^2 x", [r"1-\cos^2 x", r"(\sin x)^2", r"\sin x \sin x", r"\frac{1-\cos 2x}{2}", "sin(x)^2"],
     [r"\sin x^2", r"\sin 2x", r"\cos^2 x"]),
    ("constants", r"12\pi", ["12pi", "12π", r"\pi \cdot 12", "12*pi"], ["37.699", "12", "37.69911184307752",
     r"12\pi^2"]),
    ("constants", "e^2", [r"e \cdot e", r"\exp(2)", "exp(2)"], ["7.389", "2e"]),
    ("absolute values", "|x-1|", ["|1-x|", r"\left|x-1\right|", r"\lvert x-1\rvert", r"\sqrt{(x-1)^2}", "abs(x-1)"],
     ["x-1", "1-x"]),
    ("absolute values", "x", [], [r"\sqrt{x^2}", "|x|"]),
    ("complex numbers", "6+9i", ["9i+6", r"6 + 9 \cdot i", "3(2+3i)", r"6+9\mathrm{i}"], ["6-9i", "(6,9)", "15i"]),
    ("complex numbers", r"\frac{1}{1+i}", [r"\frac{1-i}{2}"], [r"\frac{1+i}{2}"]),
    ("complex numbers", r"e^{i\pi/3}", [r"\frac{1+i\sqrt3}{2}", r"\cos\frac{\pi}{3}+i\sin\frac\pi3"],
     [r"\frac{1-i\sqrt3}{2}"]),
    ("huge numbers", "2^{1009}", [r"2 \cdot 2^{1008}", "4^{1009/2}"], ["2^{1008}", "2^{1009}+1"]),
    ("huge numbers", "2^{100000000}", ["2^{100000000}", "2 ^ {100000000}"], ["2^{100000001}"]),
    ("expressions", "x^2-1", ["(x-1)(x+1)", "x^{2} - 1", "x**2-1", "-1+x^2", "x·x-1", "x²-1", "-(1-x^2)"], ["x^2+1",
     "y^2-1", "x^2-1=0", "x^3-1", "x^2-1.0000001", "(x-1)^2"]),
    ("expressions", "5r^5", ["5 r^{5}", "5*r^5"], ["5r^4", "5^5r"]),
    ("expressions", r"\frac{a M^{1/3}}{G M^{2/3}+b}", [r"\frac{aM^{1/3}}{b+GM^{2/3}}"],
     [r"\frac{a M^{1/3}}{G M^{2/3}-b}"]),
    ("expressions", r"I(0)e^{-\frac{t}{RC}}", ["I(0) e^{-t/(RC)}", "I(0)e^{-t/RC}"], [r"I(0)e^{-\frac{t}{R}}", "0"]),
    ("expressions", r"2r_0\sqrt{\pi G\rho_0}", [r"\sqrt{4 \pi G \rho_{0} r_{0}^{2}}"],
     [r"\sqrt{2 \pi G \rho_{0} r_{0}^{2}}"]),
    ("expressions", "2^{k-1}", [r"\frac{2^k}{2}", r"\frac12 \cdot 2^k"], ["2^k-1", "2^{k+1}"]),
    ("expressions", r"\frac{1}{x-1}", ["(x-1)^{-1}", r"\frac{-1}{1-x}"], [r"\frac{1}{x+1}", r"\frac{x}{x-1}"]),
    ("expressions", "x_1+x_2", ["x_{2}+x_{1}", "x_{1}+x_{2}"], ["x_1+x_3", "x1x2"]),
    ("expressions", "(-1)^n", ["(-1)^{n+2}", "(-1)^{-n}"], ["(-1)^{n+1}", "1"]),
    ("expressions", r"\binom{n}{k}", [r"\frac{n!}{k!(n-k)!}", r"\binom{n}{n-k}"], [r"\binom{n}{k+1}",
     r"\frac{n!}{k!}"]),
    ("expressions", r"\ln\frac{x+1}{x}", [r"\ln(x+1)-\ln x", r"-\ln\frac{x}{x+1}"], [r"\ln(x+1)+\ln x",
     r"\ln\frac{x}{x+1}"]),
    ("lists", "1,-2", ["-2, 1", "1 and -2", r"1 \text{ and } -2", r"\{1,-2\}", "x=1, x=-2",
     r"x = 1 \text{ or } x = -2", "$1$, $-2$", "1;-2", "x_1=1, x_2=-2", r"x \in \{-2, 1\}"], ["1", "1,2", "1,-2,3",
     "-1,2", "(-2,1)", "[1,-2]"]),
    ("lists", "3, 5, 7", [r"\text{3, 5, and 7}", r"5,3, \text{ and } 7"], ["3,5", "3,5,7,9", "357"]),
    ("lists", r"3 \pm 2 \sqrt{2}", [r"3+2\sqrt2, 3-2\sqrt2", r"3 \mp 2\sqrt2", "3±2√2", r"x = 3 \pm 2\sqrt{2}"],
     [r"3+2\sqrt2", r"2\sqrt2 \pm 4", "3"]),
    ("lists", r"\{1\pm\sqrt5,-2\}", [r"-2, 1+\sqrt5, 1-\sqrt5"], [r"1+\sqrt5,-2"]),
    ("lists", r"(\pm 1, 2)", ["(1,2),(-1,2)"], ["(1,2)", "(1,-2),(-1,2)"]),
    ("lists", "(1,2),(3,4)", ["(3,4), (1,2)", r"\{(1,2),(3,4)\}", r"(1,2) \text{ and } (3,4)"], ["(2,1),(3,4)",
     "1,2,3,4", "(1,2,3,4)"]),
    ("sets", r"\emptyset", [r"\varnothing", r"\{\}", "∅"], ["0", r"\{0\}"]),
    ("tuples", "(1,2)", [r"\left(1, 2\right)", r"(1,\,2)", "(x,y)=(1,2)", r"\begin{pmatrix}1\\2\end{pmatrix}",
     "x=1, y=2", r"\langle 1,2\rangle"], ["(2,1)", "(1,2,0)", "[1,2]", "(1,3)", "12", r"\{1,2\}", "x=2, y=1"]),
    ("tuples", r"\left( 3, \frac{\pi}{2} \right)", [r"(3, \pi/2)", r"(3, 90^\circ)"], [r"(3, \pi)"]),
    ("matrices", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", [r"\begin{bmatrix}1&2\\3&\frac{8}{2}\end{bmatrix}",
     r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)", r"\frac12\begin{pmatrix}2&4\\6&8\end{pmatrix}"],
     [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1\\2\\3\\4\end{pmatrix}", "(1,2,3,4)", "1,2,3,4"]),
    ("intervals", "(3,4]", [r"\left(3, 4\right]", r"3 < x \le 4", r"x \in (3,4]", r"4 \ge \lambda > 3",
     r"\{x \mid 3 < x \leq 4\}", r"x>3 \text{ and } x \le 4"], ["[3,4]", "(3,4)", "[3,4)", "(3,5]", "3,4",
     "3 < x < 4"]),
    ("intervals", "(-1,1)", ["-1<x<1", "]-1,1["], ["[-1,1]"]),
    ("intervals", r"(-\infty,-5)", ["k<-5", "-5>k", r"\{k : k < -5\}"], [r"k \le -5", "k>-5", "-5"]),
    ("intervals", r"(-\infty, 0) \cup (1, \infty)", [r"(1,+\infty)\cup(-\infty,0)", r"x<0 \text{ or } x>1", "x<0, x>1",
     r"\mathbb{R}\setminus[0,1]", "(-∞,0)∪(1,∞)"], [r"(-\infty, 0] \cup (1, \infty)", r"(-\infty,0)", "(0,1)"]),
    ("intervals", r"a \neq 2", [r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R} \setminus \{2\}", "a ≠ 2", r"2 \ne a"],
     ["a = 2", r"a \neq 1", "2"]),
    ("intervals", "[x, 1+x]", ["[x,x+1]"], ["[x+1,x]", "(x,x+1)"]),
    ("intervals", r"\mathbb{R}", [r"(-\infty,\infty)", "ℝ", r"x \in \mathbb{R}", r"\text{all real numbers}"],
     [r"\mathbb{Z}", r"[0,\infty)"]),
    ("inequalities", r"x \geq 5", [r"5 \leq x", r"[5,\infty)", r"2x \ge 10", r"-x \leq -5", r"x \geqslant 5", "x>=5"],
     ["x>5", r"x \le 5", "5", "x=5", "x<5"]),
    ("inequalities", "f(2) < f(1) < f(4)", ["f(4) > f(1) > f(2)"], ["f(1) < f(2) < f(4)"]),
    ("inequalities", "x+y<3", ["2x+2y<6", "3>x+y"], ["x+y>3", "x+y<=3", "x-y<3"]),
    ("equations", "y = 2x + 3", ["2x - y + 3 = 0", "y-3=2x", "2y=4x+6", "2x+3"], ["y = 2x - 3", "x = 2y + 3", "y=2x",
     "y<2x+3"]),
    ("equations", "x^2+y^2=25", [r"\frac{x^2}{25}+\frac{y^2}{25}=1", "25=x^2+y^2"], ["x^2+y^2=5", "x^2-y^2=25"]),
    ("equations", "5x - 7y + 11z + 4 = 0", ["-5x+7y-11z=4", "10x-14y+22z+8=0"], ["5x-7y+11z-4=0"]),
    ("labels", "5", ["x = 5", "x=5", "5=x", r"\text{Area} = 5", "AB = 5", "|AB| = 5", r"\angle ABC = 5", "x = 2+3 = 5",
     r"n_{\max} = 5", "f(2)=5", r"\frac{AB}{CD}=5", r"\frac{a}{a+b}=5", "OR = 5", r"\operatorname{Area}=5",
     r"\text{Area of } ABC = 5"], ["x = 6", "x = 5 = 6", "2x = 5", "x > 5", "x = 5, y = 6", r"x \neq 5", "x+y=5",
     r"\text{not } x = 5"]),
    ("inequalities", r"|x| \ge 1", [r"x \le -1 \text{ or } x \ge 1", r"(-\infty,-1]\cup[1,\infty)"], ["|x| > 1",
     r"x \ge 1"]),
    ("equations", "xy=1", [r"y=\frac1x", "2xy-2=0", r"x=\frac{1}{y}"], ["y=x", "2", r"x^2y=1", r"y=-\frac1x"]),
    ("equations", r"\frac{x}{y}=2", ["x=2y", r"\frac{2y}{x}=1"], ["y=2x", "xy=2"]),
    ("labels", "100", [r"\sqrt{10001} \approx 100", "100 = 10^2"], [r"99 \approx 100", r"100 \approx 101", "100 = 101",
     r"99.9 \approx 100 \approx 100.1", r"100 \pm 1"]),
    ("labels", r"\approx 3.14", ["3.14", r"\pi \approx 3.14"], [r"\pi"]),
    ("labels", "x=5", ["5", "2x=10"], ["y=5", "x=-5"]),
    ("labels", "p=3, q=4", ["3,4", "q=4, p=3"], ["p=4, q=3", "3", "r=3, s=4"]),
    ("labels", r"\frac{6^6 - 5^6}{6^5} \approx 3.99", [r"\frac{31031}{7776}"], ["3.98", r"\frac{31032}{7776}"]),
    ("functions", "f(x)=x+1", ["f(z)=z+1", "x+1", "y=x+1", "f(x) = 1 + x"], ["f(x)=x+2", "g(x)=x+1", "z+1",
     "f(x)=z+1"]),
    ("functions", "a_n = 2n+1", ["a_k=2k+1", "2n+1"], ["a_n=2n-1", "b_n=2n+1"]),
    ("functions", "f(x)=1", [r"f(x) = 1 \text{ for all } x \in \mathbb{Q}", "1"], ["f(x)=2"]),
    ("choices", r"\text{(C)}", ["C", "(C)", r"$\text{(C)}$", r"\text{(c)}", r"\text{The answer is } \text{(C)}",
     r"\textbf{(C)}", r"\text{C}", "(c)", r"\textbf{(C) } 12", "C. 12", r"\mathrm{(C)}"], ["B", r"\text{(D)}",
     r"\textbf{(B) } 12", "x", r"\text{not } \text{(C)}", r"\text{The answer is not } C"]),
    ("prose", r"x \in [-2,7]", [r"\text{The answer is } x \in [-2,7]"], [r"\text{no } x \in [-2,7]"]),
    ("prose", r"\arccos(1-2a)", [r"\text{The answer is } \arccos(1-2a)"], [r"\text{not } \arccos(1-2a)"]),
    ("prose", r"6.43 \times 10^{16} \text{ cm}^{-3}", [r"6.43 \times 10**{16} \text{ cm}**{-3}"], []),
    ("choices", "(c)", ["c", "C"], ["(d)", "D"]),
    ("glued words", "1251", ["1251bags", "1251 bags", "1251BAGS", "1251squarekilometers"], ["1251Ihopeitiscorrect",
     "1251.Ihopeitiscorrect", "1251ihopethatitiscorrect", "x=1251Ihopeitiscorrect"]),
    ("glued words", r"\text{Evelyn}", [], ["Evelyn.Ihopeitiscorrect", "EvelynIhopeitiscorrect"]),
    ("glued words", r"2\sqrt{3}", [r"2\sqrt{3}cm"], [r"2\sqrt{3}Ihopeitiscorrect"]),
    ("choices", r"\text{(A) } 5", ["5", "A"], ["(B) 5", "(A) 6", "6"]),
    ("texts", r"\text{Evelyn}", ["Evelyn", "evelyn", r"\textbf{Evelyn}", r"\text{ Evelyn }", r"\mathrm{Evelyn}"],
     ["Eve", "Angela", r"\text{not Evelyn}", r"\text{Evelyn and Angela}"]),
    ("texts", r"\text{yes}", ["Yes", "YES."], ["no"]),
    ("texts", "no", ["No.", r"\text{No}"], ["yes", "none"]),
    ("texts", r"\text{increasing on } x", [r"\text{Increasing on } x"], [r"\text{decreasing on } x"]),
    ("several readings", "x", [], ["х"]),
    ("unknown commands", r"A\subset B", [r"A \subset B"], [r"B\subset A", "AB"]),
    ("unknown commands", r"\frac{2}{3}", [r"\nicefrac{2}{3}", r"\sfrac23", r"{2 \over 3}", r"2 \over 3"],
     [r"\nicefrac{3}{2}", r"{3 \over 2}"]),
    ("unknown commands", r"{5 \choose 3}", ["10", r"\binom{5}{2}"], [r"{3 \choose 5}", r"{k \choose n}"]),
    ("unknown commands", r"a \circ b", [r"a\circ b"], [r"b \circ a", "ab"]),
    ("congruences", r"x\equiv 3\pmod 7", [r"x \equiv 3 \mod 7", r"x \equiv 3\ (\text{mod } 7)", "x = 3 (mod 7)"],
     [r"x\equiv 7\pmod 3", r"x\equiv 3\pmod 5", "x = 3"]),
    ("congruences", r"7 \bmod 3", ["1"], [r"3 \bmod 7", "7"]),
    ("unknown functions", "5", [], [r"\operatorname{erfc}(5)", r"\text{arsinh}(5)", r"\mathrm{Var}(5)",
     r"5\operatorname{cis}60^\circ"]),
    ("unknown functions", "(1,2)", [], [r"\operatorname{span}(1,2)", r"\text{gcd}(1,2)"]),
    ("words before", "5", [r"\text{The answer is } 5", r"\text{a total of } 5", r"\text{Team } 5", "Option 5",
     r"\text{five}"], [r"\text{minus } 5", r"\text{half of } 5", r"\text{at least } 5", r"\text{square root of } 5",
     "twice 5"]),
    ("words before", r"\text{increasing on }(0,1)", [], [r"\text{decreasing on }(0,1)", "(0,1)"]),
    ("words behind", "5", [r"5\text{ of the circle}", "5 red apples", "5 (cm)", r"5\text{ is correct}"],
     [r"5\text{ squared}", r"5\text{ dozen}", r"5\text{ is wrong}", r"5\text{ east}", "5 or more", "5 tenths"]),
    ("words behind", "12 apples", ["12 apple"], ["12 oranges", "12 cm"]),
    ("words behind", r"\$5\text{ loss}", [r"\$5\text{ Loss}"], [r"\$5\text{ profit}", "5"]),
    ("units", r"5\text{ km}", [r"5000\text{ metres}", r"5\,\mathrm{km}"], [r"5\text{ m}", r"5\text{ km}^2"]),
    ("mixed numbers", r"\frac54", [r"1\,\frac14", r"1{\frac14}", r"1~\frac14", r"1 \, \dfrac{1}{4}\text{ cups}",
     r"1\nicefrac{1}{4}"], [r"2\,\frac12", r"\frac14"]),
    ("derivatives", r"\frac{y}{x}", [], [r"\frac{dy}{dx}", "dy/dx", r"\frac{d^2y}{dx^2}",
     r"\frac{\partial y}{\partial x}"]),
    ("matrices", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", [r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]",
     r"\begin{Bmatrix}1&2\\3&4\end{Bmatrix}"], [r"\left[\begin{array}{cc}1&2\\4&3\end{array}\right]"]),
    ("chains", r"x=\sqrt2", [r"x=\sqrt2\approx1.41", r"x = \frac{2}{\sqrt2} = \sqrt2", r"\sqrt2 \approx 1.4142"],
     [r"x=\sqrt2\approx1.42", "x=1.41", r"x = \sqrt2 = \sqrt3"]),
    ("chains", "7", ["2+5=7", r"x = 14/2 = 7\text{ cm}"], ["x = 5+5+1 = 7 = 11", "7 = 8"]),
    ("set-builder", r"[1,\infty)", [r"\left\{x\,\middle|\,x\ge1\right\}", r"\{x\in\mathbb{R} : x \ge 1\}",
     r"A=\{x \mid x \ge 1\}"], [r"\{x \mid x > 1\}", r"\{x\in\mathbb{Z} : x \ge 1\}"]),
    ("environments", "x=1, y=2", [r"\begin{align*} x&=1\\ y&=2\end{align*}", r"\begin{cases} y=2,\\ x=1.\end{cases}"],
     [r"\begin{aligned} x&=2\\ y&=1\end{aligned}"]),
    ("environments", r"\begin{cases} x & x>0 \\ -x & x\le 0\end{cases}",
     [r"\begin{cases} -x, & \text{if } x\le 0,\\ x, & \text{when } x>0.\end{cases}"],
     [r"\begin{cases} -x & \text{if } x>0 \\ x & \text{if } x\le 0\end{cases}"]),
    ("environments", "(2,3)", [r"\left\{\begin{array}{l}x=2\\y=3\end{array}\right."], ["(3,2)"]),
    ("unknown functions", "0.5", [r"\Pr(A)=0.5", r"\operatorname{P}(A)=0.5"], [r"\Pr(0.5)", r"\neg 0.5"]),
    ("names", r"\text{A and C}", ["A, C", "C and A"], ["A, B", "AC"]),
    ("names", r"\text{Bob}", ["Bob"], ["obB", "Rob"]),
    ("repeating decimals", r"\frac{2}{11}", [r"0.\dot{1}\dot{8}", r"0.\overline{18}"], [r"0.1\dot{8}", "0.18"]),
    ("names", "g_k", ["{g}_{k}"], ["gk"]),
    ("bases", "1010_2", ["(1010)_2", "{1010}_{2}"], ["(1010)_3", "(1011)_2"]),
    ("degrees", r"20^\circ C", ["20", r"20\text{ degrees Celsius}"], [r"20^\circ F"]),
]
ROWS = [(section, gold, other, expected) for section, gold, equal, different in TABLE
        for others, expected in ((equal, True), (different, False)) for other in others]


@pytest.mark.parametrize("section, gold, prediction, expected", ROWS)
def test_table(section, gold, prediction, expected):
    assert answers_match(prediction, gold) == expected, explain(prediction, gold)
    assert answers_match(gold, prediction) == expected, "not symmetric"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_is_needed_for_its_example(rule, monkeypatch):
    assert answers_match(rule.example, rule.equal), explain(rule.example, rule.equal)
    monkeypatch.setattr(answer_checker, "RULES", [other for other in RULES if other is not rule])
    assert not answers_match(rule.example, rule.equal)


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{5}.", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\fbox{7}", "7"),
    (r"\boxed {7}", "7"),
    (r"\boxed 5", "5"), (r"$\boxed5$", "5"), (r"\boxed{1} then \boxed{2}", "2"), (r"\\boxed{7}", "7"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{ 3 }", "3"), (r"\boxed{1 \boxed{2}}", r"1 \boxed{2}"),
    (r"\boxed{1} and \boxed{2", "1"), (r"\boxed{1 and \boxed{2}", "2"), ("{ {x} \\boxed{3}", "3"),
    (r"} \boxed{3}", "3"), ("the answer is 5", None), (r"\boxed{}", None), (r"\boxed{1} \boxed{}", "1"),
    (r"\boxed{5", None), (r"\boxed", None), (r"\boxedx{5}", None), ("", None),
    (r"So \boxed{3}. I used \boxed as asked.", "3"), (r"\boxed{3}, in \boxed{...} as asked", "3"),
    (r"\boxed{3} \boxed{\, }", "3"), (r"\boxed{3} \boxed{\text{}}", "3"), (r"\boxed{\{\}}", r"\{\}"),
    ("<think>\n\\boxed{3}", None), (r"\boxed{1} <think> \boxed{3}", "1"), (r"<think>\boxed{3}</think>", "3"),
    (r"\boxed{1} </think> \boxed{3}", "3")])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_a_thought_that_never_ends_counts_on_request():
    assert extract_answer("<think>\n\\boxed{3}", open_thought_counts=True) == "3"
    assert is_correct("<think>\n\\boxed{3}", "3", open_thought_counts=True)
    assert not is_correct("<think>\n\\boxed{3}", "3")


def test_is_correct():
    assert is_correct(r"The answer is \boxed{0.50}.", r"\frac12")
    assert is_correct(r"\boxed{0.02}", ["0.01", "0.02"])
    assert not is_correct(r"\boxed{0.03}", ["0.01", "0.02"])
    assert not is_correct("0.5", r"\frac12")  # no box
    assert not is_correct(r"\boxed{}", "") and not is_correct(None, "1") and not answers_match(None, "None")
    assert is_correct(r"\boxed{1}", 1) and is_correct(r"\boxed{142}", 142.0) and answers_match("0.5", [2, 0.5])


@pytest.mark.parametrize("gold", [None, True, ["1", None], ("1",), {"answer": "1"}, b"1"])
@pytest.mark.parametrize("response", [r"\boxed{1}", "no box", None])
def test_a_gold_of_another_type_is_a_type_error(response, gold):
    with pytest.raises(TypeError, match="expected gold as a str, int, float or a list of these, found "):
        is_correct(response, gold)


def test_a_prediction_of_another_type_is_a_type_error():
    for call in (lambda: answers_match(1, "1"), lambda: extract_answer(1), lambda: is_correct(["1"], "1")):
        with pytest.raises(TypeError, match="as a str"):
            call()


def test_accuracy_reward_has_the_signature_of_trl():
    """Called as GRPOTrainer does: keywords, prompts and other columns included, plain or conversational completions."""
    texts, columns = [r"so \boxed{2}", r"\boxed{3}", "2"], {"answer": ["2", 2, "2"], "source": ["a", "b", "c"]}
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    for prompts, completions in ((["p"] * 3, texts), ([[{"role": "user", "content": "p"}]] * 3, chats)):
        rewards = accuracy_reward(prompts=prompts, completions=completions, completion_ids=[[1]] * 3, **columns)
        assert rewards == [1.0, 0.0, 0.0] and all(isinstance(reward, float) for reward in rewards)
    with pytest.raises(ValueError):
        accuracy_reward(completions=texts, answer=["2"])


def test_past_the_limits_is_not_equal():
    assert answers_match("9" * answer_checker.MAX_DIGITS, "9" * answer_checker.MAX_DIGITS)
    assert answers_match("9" * 5000, "9" * 5000) and not answers_match("9" * 5000, "9" * 5000 + "x")
    deep = "(" * 100 + "1" + ")" * 100
    assert not answers_match(deep, "1") and "deep" in explain(deep, "1")
    assert not answers_match(r"\frac{1}{0}", r"\frac{2}{0}")
    assert not answers_match("((9!)!)!", "1") and "factorial" in explain("((9!)!)!", "1")


def test_explain():
    text = explain(r"\frac{1}{3}", "0.333")
    assert text == "prediction: 1/3\ngold: 333/1000\nnot equal: different values"
    assert "equal: equal values" in explain("x>5", r"(5,\infty)")
    assert "int is not supported" in explain(r"\int_0^1 x dx", "1/2")


@pytest.mark.parametrize("flags", [[], ["-O"], ["-I"]])
def test_copied_alone(tmp_path, flags):
    shutil.copy(CHECKER, tmp_path / "answer_checker.py")

    def run(*arguments):
        command = [sys.executable, *flags, "answer_checker.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)

    done = run(r"-\sqrt{8}", r"-2\sqrt2")
    assert done.returncode == 0 and "\nequal: equal values" in done.stdout
    assert run("1", "2").returncode == 1
    rows = [{"gold": ["1", 2], "response": r"\boxed{2}"}, {"gold": "1", "prediction": "x=2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = run("--file", "rows.jsonl")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "1 of 2 correct, 0 not read"
    bad = '{"gold": "1"}\nno json\n[]\n{"gold": null, "prediction": "1"}\n{"gold": 1, "prediction": "1"}\n'
    (tmp_path / "bad.jsonl").write_text(bad, encoding="utf-8")
    done = run("--file", "bad.jsonl")
    assert done.returncode == 2 and done.stdout.splitlines()[-1] == "1 of 1 correct, 4 not read"
    assert [line.partition(": ")[2][:17] for line in done.stderr.splitlines()] == [
        "bad.jsonl, line %d" % n for n in range(1, 5)]
    assert run("--help").returncode == 0 and "--file" in run("--help").stdout
    for usage in ([], ["1"], ["1", "2", "3"], ["--file", "absent.jsonl"]):
        assert run(*usage).returncode == 2 and run(*usage).stderr.startswith("error: ")


def test_import_is_quick_and_leaves_sympy_alone():
    code = "import sys, time; t = time.process_time(); import redi.answer_checker; " \
           "print(time.process_time() - t, 'sympy' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=CHECKER.parent.parent, text=True, capture_output=True, check=True)
    seconds, sympy = done.stdout.split()
    assert float(seconds) < 0.2 and sympy == "False"


def test_low_recursion_limit_and_deep_stack():
    verdicts = []

    def deep(n):
        if n:
            deep(n - 1)
        else:
            verdicts.append(answers_match(r"\frac{1}{1+\frac{1}{2}}", "2/3"))

    thread = threading.Thread(target=lambda: [deep(n) for n in (0, sys.getrecursionlimit() - 40)])
    thread.start()
    thread.join()
    assert verdicts[0] is True  # near the end of the stack the verdict may be False, but nothing is raised
    assert len(verdicts) == 2
