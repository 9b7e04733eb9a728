"""Generators about numbers: arithmetic, comparison, word problems, lists of numbers, counting, units, number names.

Owns the wordings and the right answers of these tasks. Every generator takes a Voice and returns a Sample.
"""

from __future__ import annotations

from sample import Check, Generator, Sample, Voice
from tables import NAMES, ROMAN, UNITS, in_words, unit


def _number(v: Voice) -> int:
    """Mostly small: 1 to 3 digits with equal chance, so that small sums are well known."""
    return v.int(0, (9, 99, 999)[v.int(0, 2)])


_ADD = (
    "What is {a} [+|plus] {b}?",
    "What's {a} [+|plus] {b}?",
    "{a} + {b}",
    "{a} + {b} =",
    "{a}+{b}",
    "{a}+{b}=?",
    "{a} + {b} = ?",
    "what is {a}+{b}?",
    "!add {a} and {b}",
    "!add {a} to {b}",
    "!calculate {a} [+|plus] {b}",
    "!compute {a} [+|plus] {b}",
    "How much is {a} [+|plus] {b}?",
    "What is the sum of {a} and {b}?",
    "!give me the sum of {a} and {b}",
    "!tell me what {a} [+|plus] {b} is",
    "What do you get if you add {a} and {b}?",
    "{a} plus {b}?",
    "!sum {a} and {b}",
    "!work out {a} + {b}",
    "What does {a} + {b} equal?",
    "{a} plus {b} equals?",
    "!solve {a} + {b}",
)
_SUB = (
    "What is {a} [-|minus] {b}?",
    "What's {a} [-|minus] {b}?",
    "{a} - {b}",
    "{a} - {b} =",
    "{a}-{b}",
    "{a}-{b}=?",
    "!subtract {b} from {a}",
    "!calculate {a} [-|minus] {b}",
    "!compute {a} [-|minus] {b}",
    "How much is {a} [-|minus] {b}?",
    "What is {a} take away {b}?",
    "What is the difference between {a} and {b}?",
    "!take {b} away from {a}",
    "!tell me what {a} [-|minus] {b} is",
    "{a} minus {b}?",
    "!work out {a} - {b}",
    "What does {a} - {b} equal?",
    "!solve {a} - {b}",
    "what is {a}-{b}?",
)
_MUL = (
    "What is {a} [*|x|times|multiplied by] {b}?",
    "What's {a} [*|x|times] {b}?",
    "{a} [*|x] {b}",
    "{a} [*|x] {b} =",
    "{a}*{b}",
    "{a}*{b}=?",
    "!multiply {a} by {b}",
    "!multiply {a} and {b}",
    "!calculate {a} [*|times|x] {b}",
    "!compute {a} [*|times] {b}",
    "How much is {a} [*|times|x] {b}?",
    "What is the product of {a} and {b}?",
    "{a} times {b}?",
    "!work out {a} * {b}",
    "What does {a} * {b} equal?",
    "!solve {a} * {b}",
)
_DIV = (
    "What is {a} [/|divided by] {b}?",
    "What's {a} [/|divided by] {b}?",
    "{a} / {b}",
    "{a} / {b} =",
    "{a}/{b}",
    "!divide {a} by {b}",
    "!calculate {a} [/|divided by] {b}",
    "How much is {a} [/|divided by] {b}?",
    "How many times does {b} go into {a}?",
    "!compute {a} / {b}",
)


def add(v: Voice) -> Sample:
    a, b = _number(v), _number(v)
    return v.reply("add", v.ask(_ADD, a=a, b=b), ("{a} + {b} = {c}",), f"{a} {b}" if a + b > 30 else "", a=a, b=b, c=a + b)


def subtract(v: Voice) -> Sample:
    a, b = _number(v), _number(v)
    text = v.ask(_SUB, a=a, b=b)
    if a < b and (v.chance(0.6) or "difference" in text):
        a, b = b, a
        text = v.ask(_SUB, a=a, b=b)
    return v.reply("subtract", text, ("{a} - {b} = {c}",), f"{a} {b}" if max(a, b) > 20 else "", a=a, b=b, c=a - b)


def multiply(v: Voice) -> Sample:
    a, b = v.int(0, 12), v.int(0, 12)
    key = ""
    if v.chance(0.3):
        a, b = v.int(11, 99), v.int(2, 9)
        key = f"{a} {b}"
    elif v.chance(0.1):
        a, b = v.int(1, 99), v.pick((10, 100))
    if v.chance(0.3):
        a, b = b, a
    return v.reply("multiply", v.ask(_MUL, a=a, b=b), ("{a} * {b} = {c}",), key, a=a, b=b, c=a * b)


def divide(v: Voice) -> Sample:
    b, c = v.int(1, 12), v.int(0, 12)
    return v.reply("divide", v.ask(_DIV, a=b * c, b=b), ("{a} / {b} = {c}",), a=b * c, b=b, c=c)


def divide_by_zero(v: Voice) -> Sample:
    return v.reply("divide", v.ask(_DIV, a=v.int(0, 99), b=0), ("Division by zero is not defined.",))


def two_steps(v: Voice) -> Sample:
    a, b, c = v.int(1, 10), v.int(1, 10), v.int(1, 10)
    form = v.int(0, 3)
    if form == 0:
        text, value, steps = f"{a} + {b} + {c}", a + b + c, f"{a} + {b} = {a + b}, and {a + b} + {c} = {a + b + c}"
    elif form == 1:
        text, value, steps = f"{a} + {b} * {c}", a + b * c, f"{b} * {c} = {b * c}, and {a} + {b * c} = {a + b * c}"
    elif form == 2:
        text, value, steps = f"({a} + {b}) * {c}", (a + b) * c, f"{a} + {b} = {a + b}, and {a + b} * {c} = {(a + b) * c}"
    else:
        text, value, steps = f"{a} * {b} - {c}", a * b - c, f"{a} * {b} = {a * b}, and {a * b} - {c} = {a * b - c}"
    ask = v.ask(
        ("What is {e}?", "{e}", "{e} = ?", "!calculate {e}", "!compute {e}", "How much is {e}?", "!evaluate {e}", "!solve {e}", "What's {e}?"), e=text
    )
    return v.reply("two_steps", ask, ("{s}. The answer is {c}.",), text, s=steps, c=value)


def powers(v: Voice) -> Sample:
    n = v.int(1, 15)
    kind = v.int(0, 3)
    if kind == 0:
        return v.reply(
            "powers",
            v.ask(("What is {n} squared?", "What is the square of {n}?", "!square {n}", "{n}^2", "!compute the square of {n}"), n=n),
            ("{n} squared is {c}.",),
            n=n,
            c=n * n,
        )
    if kind == 1:
        ask = v.ask(("What is the square root of {m}?", "!find the square root of {m}", "sqrt({m})", "Square root of {m}?"), m=n * n)
        return v.reply("powers", ask, ("The square root of {m} is {n}.",), m=n * n, n=n)
    m = v.int(1, 100)
    if kind == 2:
        ask = v.ask(("What is [double|twice] {m}?", "!double {m}", "What is {m} doubled?", "What is two times {m}?"), m=m)
        return v.reply("powers", ask, ("Double {m} is {c}.",), str(m), m=m, c=2 * m)
    ask = v.ask(("What is half of {m}?", "!halve {m}", "!give me half of {m}", "Half of {m}?", "What is {m} divided in half?"), m=2 * m)
    return v.reply("powers", ask, ("Half of {m} is {c}.",), str(m), m=2 * m, c=m)


def percent(v: Voice) -> Sample:
    p, step = v.pick(((10, 10), (50, 2), (25, 4), (100, 1), (20, 5)))
    k = v.int(1, 20)
    ask = v.ask(("What is {p}[%| percent] of {n}?", "!calculate {p}[%| percent] of {n}", "How much is {p}% of {n}?", "{p}% of {n}"), p=p, n=k * step)
    return v.reply("percent", ask, ("{p}% of {n} is {c}.",), p=p, n=k * step, c=k * step * p // 100)


def compare(v: Voice) -> Sample:
    top = v.pick((20, 100, 1000, 1000))
    a, b = v.int(0, top), v.int(0, top)
    if a == b:
        b += 1
    key = f"{a} {b}"
    if v.chance(0.5):
        ask = v.ask(
            (
                "Which is [larger|bigger|greater|higher][:|,|] {a} or {b}?",
                "Which number is [larger|bigger|greater], {a} or {b}?",
                "!tell me which is [bigger|larger|greater], {a} or {b}",
                "What is [bigger|larger], {a} or {b}?",
                "!compare {a} and {b}",
                "{a} or {b}, which is [larger|bigger]?",
                "!give me the larger of {a} and {b}",
            ),
            a=a,
            b=b,
        )
        return v.reply("compare", ask, ("{x} is larger than {y}.",), key, x=max(a, b), y=min(a, b))
    if v.chance(0.5):
        ask = v.ask(
            (
                "Which is [smaller|less|lower][:|,|] {a} or {b}?",
                "Which number is smaller, {a} or {b}?",
                "What is smaller, {a} or {b}?",
                "{a} or {b}, which is smaller?",
                "!tell me which is smaller, {a} or {b}",
            ),
            a=a,
            b=b,
        )
        return v.reply("compare", ask, ("{x} is smaller than {y}.",), key, x=min(a, b), y=max(a, b))
    word, right = ("greater", a > b) if v.chance(0.5) else ("less", a < b)
    ask = v.ask(
        (f"Is {{a}} {word} than {{b}}?", f"Is {{a}} {'>' if word == 'greater' else '<'} {{b}}?", f"Is it true that {{a}} is {word} than {{b}}?"),
        a=a,
        b=b,
    )
    return v.reply("compare", ask, (f"Yes, {a} is {word} than {b}." if right else f"No, {a} is not {word} than {b}.",), key)


def parity(v: Voice) -> Sample:
    n = v.int(0, v.pick((20, 100, 1000)))
    kind = "even" if n % 2 == 0 else "odd"
    if v.chance(0.5):
        ask = v.ask(
            ("Is {n} [even or odd|odd or even]?", "Is the number {n} even or odd?", "!tell me if {n} is even or odd", "{n}: even or odd?"), n=n
        )
        return v.reply("parity", ask, ("{n} is {k}.",), str(n), n=n, k=kind)
    asked = v.pick(("even", "odd"))
    ask = v.ask((f"Is {{n}} {asked}?", f"Is {{n}} an {asked} number?", f"Is the number {{n}} {asked}?"), n=n)
    return v.reply("parity", ask, (f"Yes, {n} is {kind}." if asked == kind else f"No, {n} is {kind}.",), str(n))


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def prime(v: Voice) -> Sample:
    n = v.int(1, 60)
    ask = v.ask(("Is {n} [prime|a prime number|a prime]?", "!tell me if {n} is prime", "Is the number {n} prime?"), n=n)
    return v.reply("prime", ask, (f"Yes, {n} is a prime number." if _prime(n) else f"No, {n} is not a prime number.",))


_THINGS = (
    "apples oranges books pencils coins stamps balls cookies marbles eggs flowers cards stickers candies toys shells bottles chairs pens cups"
).split()


def word_problem(v: Voice) -> Sample:
    who, other = v.some(NAMES, 2)
    thing = v.pick(_THINGS)
    kind = v.int(0, 4)
    a, b = v.int(2, 50), v.int(1, 50)
    s = dict(n=who, m=other, t=thing)
    if kind in (0, 1):
        ask = v.fill(
            v.pick(
                (
                    "{n} has {a} {t} and [buys|gets|finds] {b} more. How many {t} does {n} have [now|]?",
                    "{n} has {a} {t}. {m} gives {n} {b} more {t}. How many {t} does {n} have now?",
                    "If {n} has {a} {t} and {m} has {b} {t}, how many {t} do they have [together|in total|altogether]?",
                    "{n} had {a} {t} and then got {b} more. How many [{t} |]are there now?",
                    "There are {a} {t} on the table and {b} {t} in a box. How many {t} are there in total?",
                    "I have {a} {t} and I buy {b} more. How many {t} do I have?",
                )
            ).replace("[{t} |]", v.pick((thing + " ", ""))),
            **s,
            a=a,
            b=b,
        )
        value, steps = a + b, f"{a} + {b} = {a + b}"
    elif kind in (2, 3):
        a, b = max(a, b) + 1, min(a, b)
        ask = v.fill(
            v.pick(
                (
                    "{n} has {a} {t} and [gives {b} to {m}|loses {b}|sells {b}]. How many {t} does {n} have [left|now]?".replace(
                        "{b} to {m}", f"{b} to {other}"
                    ).replace("{b}", str(b)),
                    "{n} had {a} {t}. {m} took {b} of them. How many are left?",
                    "There are {a} {t} in a box. {n} takes {b} out. How many {t} are left [in the box|]?",
                    "If {n} has {a} {t} and gives away {b}, how many {t} are left?",
                    "I have {a} {t} and I lose {b}. How many {t} do I have left?",
                )
            ),
            **s,
            a=a,
            b=b,
        )
        value, steps = a - b, f"{a} - {b} = {a - b}"
    else:
        a, b = v.int(2, 12), v.int(2, 12)
        ask = v.fill(
            v.pick(
                (
                    "{n} has {a} boxes with {b} {t} each. How many {t} does {n} have [in total|]?",
                    "There are {a} bags. Each bag has {b} {t}. How many {t} are there [in total|altogether|]?",
                    "{n} buys {a} packs of {b} {t}. How many {t} is that?",
                    "If one box holds {b} {t}, how many {t} do {a} boxes hold?",
                )
            ),
            **s,
            a=a,
            b=b,
        )
        value, steps = a * b, f"{a} * {b} = {a * b}"
    return v.reply("word_problem", ask, ("{s}, so the answer is {c} {t}.",), f"{kind // 2} {a} {b}", s=steps, c=value, t=thing)


def _numbers(v: Voice, low: int = 3, high: int = 6) -> list[int]:
    top = v.pick((9, 20, 99, 99))
    return [v.int(1, top) for _ in range(v.int(low, high))]


def _listed(v: Voice, xs: list[int]) -> str:
    text = v.pick((", ", ", ", ", ", " ", ",")).join(map(str, xs))
    return f"[{text}]" if v.chance(0.2) and "," in text else text


def sort_numbers(v: Voice) -> Sample:
    xs = _numbers(v)
    down = v.chance(0.35)
    out = sorted(xs, reverse=down)
    if down:
        ask = v.ask(
            (
                "!sort [these numbers |the numbers |the list |]in descending order: {l}",
                "!sort [these |the |]numbers from [largest to smallest|high to low|biggest to smallest]: {l}",
                "!order these numbers from largest to smallest: {l}",
                "!put these numbers in descending order: {l}",
                "!sort {l} in descending order",
            ),
            l=_listed(v, xs),
        )
    else:
        ask = v.ask(
            (
                "!sort [these numbers|the numbers|this list|the list|this list of numbers|the following numbers]"
                "[ in ascending order| from smallest to largest|]: {l}",
                "!sort {l}",
                "!order these numbers[ from smallest to largest|]: {l}",
                "!put these numbers in [order|ascending order]: {l}",
                "!sort the list {l}",
                "!arrange [these|the] numbers from [small to large|low to high|smallest to largest]: {l}",
                "!sort {l} in ascending order",
            ),
            l=_listed(v, xs),
        )
    return v.reply("sort_numbers", ask, (", ".join(map(str, out)),), f"{down} {xs}")


def list_stat(v: Voice) -> Sample:
    xs = _numbers(v)
    kind = v.int(0, 3)
    listed = _listed(v, xs)
    if kind == 0:
        ask = v.ask(
            (
                "What is the [largest|biggest|greatest|highest|maximum] [number |value |]in {l}?",
                "!find the [largest|biggest|maximum] number: {l}",
                "!find the maximum of {l}",
                "What is the max[imum|] of {l}?",
                "Which [number |]is the [largest|biggest]: {l}?",
                "max({l})",
            ),
            l=listed,
        )
        return v.reply("list_stat", ask, ("The largest number is {c}.",), f"{xs}", c=max(xs))
    if kind == 1:
        ask = v.ask(
            (
                "What is the [smallest|lowest|minimum] [number |value |]in {l}?",
                "!find the [smallest|minimum] number: {l}",
                "!find the minimum of {l}",
                "What is the min[imum|] of {l}?",
                "Which [number |]is the smallest: {l}?",
                "min({l})",
            ),
            l=listed,
        )
        return v.reply("list_stat", ask, ("The smallest number is {c}.",), f"{xs}", c=min(xs))
    if kind == 2:
        ask = v.ask(
            (
                "How many numbers are [there |]in {l}?",
                "!count the numbers: {l}",
                "!count the numbers in this list: {l}",
                "What is the length of the list {l}?",
                "How long is the list {l}?",
            ),
            l=listed,
        )
        return v.reply("list_stat", ask, ("There are {c} numbers.",), f"{xs}", c=len(xs))
    xs = [x % 10 + 1 for x in xs[:4]]
    ask = v.ask(
        ("What is the sum of {l}?", "!add up {l}", "!add these numbers: {l}", "!sum the list {l}", "!sum these numbers: {l}"), l=_listed(v, xs)
    )
    total, steps = xs[0], []
    for x in xs[1:]:
        steps.append(f"{total} + {x} = {total + x}")
        total += x
    return v.reply("list_sum", ask, ("{s}. The sum is {c}.",), f"{xs}", s=", ".join(steps), c=total)


def list_filter(v: Voice) -> Sample:
    xs = _numbers(v, 3, 7)
    kind = v.int(0, 2)
    listed = _listed(v, xs)
    if kind == 0:
        ask = v.ask(
            (
                "!reverse [the list |this list: |]{l}",
                "!reverse these numbers: {l}",
                "!write these numbers in reverse order: {l}",
                "!reverse the order of {l}",
            ),
            l=listed,
        )
        return v.reply("list_filter", ask, (", ".join(map(str, xs[::-1])),), f"r{xs}")
    word = v.pick(("even", "odd"))
    out = [x for x in xs if x % 2 == (word == "odd")]
    ask = v.ask(
        (
            f"Which [of these |]numbers are {word}: {{l}}?",
            f"!list the {word} numbers in {{l}}",
            f"!pick the {word} numbers from {{l}}",
            f"!give me only the {word} numbers: {{l}}",
        ),
        l=listed,
    )
    return v.reply("list_filter", ask, (", ".join(map(str, out)) if out else f"There are no {word} numbers.",), f"{word}{xs}")


def count(v: Voice) -> Sample:
    a, n = (1 if v.chance(0.6) else v.int(0, 90)), v.int(2, 15)
    b = a + n
    kind = v.int(0, 3)
    if kind == 0 and a == 1:
        ask = v.ask(
            ("!count to {b}", "!count up to {b}", "!count from 1 to {b}", "!count from one to {w}", "!list the numbers from 1 to {b}"),
            b=b,
            w=in_words(b),
        )
        return v.reply("count", ask, (", ".join(map(str, range(1, b + 1))),))
    if kind <= 1:
        ask = v.ask(
            (
                "!count from {a} to {b}",
                "!count up from {a} to {b}",
                "!list [all |the |]numbers from {a} to {b}",
                "!write the numbers from {a} to {b}",
                "!give me the numbers between {a} and {b}",
            ),
            a=a,
            b=b,
        )
        return v.reply("count", ask, (", ".join(map(str, range(a, b + 1))),), f"{a} {b}" if a > 1 else "")
    if kind == 2:
        ask = v.ask(
            (
                "!count down from {b} to {a}",
                "!count backwards from {b} to {a}",
                "!count from {b} down to {a}",
                "!list the numbers from {b} down to {a}",
            ),
            a=a,
            b=b,
        )
        return v.reply("count", ask, (", ".join(map(str, range(b, a - 1, -1))),), f"{b} {a}" if a > 1 else "")
    step, m = v.pick((2, 3, 5, 10)), v.int(3, 10)
    ask = v.ask(
        ("!count by {s}s to {t}", "!count in {s}s up to {t}", "!list the first {m} multiples of {s}", "!give me the first {m} multiples of {s}"),
        s=step,
        t=step * m,
        m=m,
    )
    return v.reply("count", ask, (", ".join(str(step * i) for i in range(1, m + 1)),))


def sequence(v: Voice) -> Sample:
    step, a, n = v.pick((1, 2, 3, 4, 5, 10, 1, 2, 5, -1, -2)), v.int(1, 40), v.int(3, 5)
    a = a + 20 if step < 0 else a
    xs = [a + step * i for i in range(n)]
    ask = v.ask(
        (
            "What comes next: {l}?",
            "What comes next[?| in the sequence?] {l}",
            "What is the next number[:| in the sequence| in] {l}?",
            "!continue the sequence: {l}",
            "{l}, ... what is next?",
            "!tell me the next number: {l}",
            "!complete the sequence {l}, ...",
        ),
        l=", ".join(map(str, xs)),
    )
    return v.reply("sequence", ask, ("The next number is {c}.",), f"{a} {step}", c=a + step * n)


def neighbor(v: Voice) -> Sample:
    n = v.int(1, v.pick((20, 100, 999)))
    if v.chance(0.5):
        ask = v.ask(
            (
                "What [number |]comes [after|right after] {n}?",
                "Which number follows {n}?",
                "What is the number after {n}?",
                "What is one more than {n}?",
            ),
            n=n,
        )
        return v.reply("neighbor", ask, ("The number after {n} is {c}.",), str(n), n=n, c=n + 1)
    ask = v.ask(("What [number |]comes [before|right before] {n}?", "What is the number before {n}?", "What is one less than {n}?"), n=n)
    return v.reply("neighbor", ask, ("The number before {n} is {c}.",), str(n), n=n, c=n - 1)


def number_name(v: Voice) -> Sample:
    n = v.int(0, v.pick((20, 99, 999, 9999)))
    w = in_words(n)
    key = str(n) if n > 100 else ""
    if v.chance(0.55):
        ask = v.ask(
            (
                "!write {n} in words",
                "How do you [write|spell|say] {n} in words?",
                "!spell [out |]the number {n}",
                "!write the number {n} as words",
                "!convert {n} to words",
                "What is {n} in words?",
                "!translate {n} into words",
                "{n} in words",
            ),
            n=n,
        )
        return v.reply("number_name", ask, ("{n} in words is {w}.",), key, n=n, w=w)
    ask = v.ask(
        (
            "!write {w} as a number",
            "!write {w} in digits",
            "What number is {w}?",
            "!convert {w} to [digits|a number]",
            "What is {w} in digits?",
            "!turn {w} into a number",
        ),
        w=w,
    )
    return v.reply("number_name", ask, ("{w} is {n}.",), key, n=n, w=w)


def convert(v: Voice) -> Sample:
    big, small, k = v.pick(UNITS)
    n = v.int(1, 12 if k in (60, 24, 12, 7, 3) else 50)
    if v.chance(0.6):
        x, a, b, y = n, big, small, n * k
    else:
        x, a, b, y = n * k, small, big, n
    ask = v.ask(
        (
            "How many {bs} are [there |]in {x} {a}?",
            "!convert {x} {a} to {bs}",
            "!convert {x} {a} into {bs}",
            "What is {x} {a} in {bs}?",
            "How many {bs} is {x} {a}?",
            "{x} {a} in {bs}?",
        ),
        x=x,
        a=unit(a, x),
        bs=unit(b, 2),
    )
    return v.reply("convert", ask, ("{x} {a} is {y} {b}.",), f"{x} {a} {b}" if n > 12 else "", x=x, a=unit(a, x), y=y, b=unit(b, y))


def rounding(v: Voice) -> Sample:
    n, base = v.int(1, 999), v.pick((10, 10, 100))
    c = (n + base // 2) // base * base
    word = "ten" if base == 10 else "hundred"
    ask = v.ask((f"!round {{n}} to the nearest {v.pick((word, str(base)))}", f"What is {{n}} rounded to the nearest {word}?"), n=n)
    return v.reply("rounding", ask, ("{n} rounded to the nearest {w} is {c}.",), f"{n} {base}", n=n, w=word, c=c)


def roman(v: Voice) -> Sample:
    n = v.int(1, 20)
    if v.chance(0.5):
        ask = v.ask(("What is {n} in Roman numerals?", "!write {n} in Roman numerals", "!convert {n} to a Roman numeral"), n=n)
        return v.reply("roman", ask, ("{n} in Roman numerals is {r}.",), n=n, r=ROMAN[n - 1])
    ask = v.ask(
        ("What number is the Roman numeral {r}?", "What does the Roman numeral {r} mean?", "!convert the Roman numeral {r} to a number"),
        r=ROMAN[n - 1],
    )
    return v.reply("roman", ask, ("The Roman numeral {r} is {n}.",), n=n, r=ROMAN[n - 1])


def chain(v: Voice) -> Sample:
    """A sum, then one or two follow-ups on the result."""
    a, b = v.int(1, 60), v.int(1, 40)
    value = a + b
    messages = [{"role": "user", "content": v.ask(_ADD, a=a, b=b)}, {"role": "assistant", "content": f"{a} + {b} = {value}"}]
    for _ in range(v.int(1, 2)):
        c = v.int(1, 20)
        op = v.pick("+-*" if value <= 12 and c <= 12 else "+-")
        words = {
            "+": ("[And now |Now |Then |]add {c}[ to that| to it|].", "Plus {c}?", "What if I add {c}?", "And plus {c}?", "Add {c} more."),
            "-": ("[And now |Now |Then |]subtract {c}[ from that| from it|].", "Minus {c}?", "And minus {c}?", "Take away {c}."),
            "*": ("[And now |Now |]multiply [that|it] by {c}.", "Times {c}?", "And times {c}?"),
        }[op]
        new = value + c if op == "+" else value - c if op == "-" else value * c
        text = v.fill(v.pick(words), c=c)
        messages += [{"role": "user", "content": text[0].upper() + text[1:]}, {"role": "assistant", "content": f"{value} {op} {c} = {new}"}]
        value = new
    return Sample("chain", messages, Check("exact", (messages[-1]["content"],)), f"{a} {b}")


TASKS: dict[Generator, float] = {
    add: 3.0,
    subtract: 3.0,
    multiply: 2.0,
    divide: 1.0,
    divide_by_zero: 0.03,
    two_steps: 1.5,
    powers: 0.8,
    percent: 0.5,
    compare: 1.2,
    parity: 0.6,
    prime: 0.3,
    word_problem: 2.0,
    sort_numbers: 2.0,
    list_stat: 1.5,
    list_filter: 1.2,
    count: 1.2,
    sequence: 0.8,
    neighbor: 0.5,
    number_name: 1.5,
    convert: 1.2,
    rounding: 0.5,
    roman: 0.3,
    chain: 1.2,
}
