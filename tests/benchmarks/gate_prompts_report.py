# ruff: noqa: E501
"""The prompt sets of the main table of docs/routing.md: written after the rule was fixed, and run once on each model.

Wordings, languages and unknown kinds are others than those of the collections in ``gate_prompts.py``; tasks and their
items are the same. Everything follows from the seed.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from random import Random

from gate_prompts import (
    SEEN,
    TASKS,
    PromptSet,
    characters,
    distinct,
    filled,
    item,
    misspelt_words,
    mistyped_in_haste,
    sampled,
    sql_parts,
)

WORDINGS = {
    "numbers": (
        "What does {x} look like in writing?",
        "Give the number name of {x}.",
        "Fill in the amount in words: {x}",
        "{x} (write it as words)",
        "How should a narrator read {x}?",
        "Rewrite {x} without any digits.",
        "I want to see {x} as a word.",
        "Please say the number {x}.",
    ),
    "spelling": (
        "Is there an error in the spelling of {x}?",
        "Rewrite {x} without the mistake.",
        "My teacher underlined {x}. How is it spelt?",
        "Tell me how to spell {x}.",
        "{x}, but spelled the right way",
        "A letter is wrong in {x}. Correct it.",
        "What is {x} supposed to be?",
        "The word {x} needs correcting.",
    ),
    "SQL": (
        "Can this be done in SQL? {x}",
        "Write a statement for MariaDB. {x}",
        "{x} Show me the SQL.",
        "The query should return the following. {x}",
        "SQL wanted: {x}",
        "I have to report this from the database: {x}",
        "What do I type into psql for this? {x}",
    ),
}
LANGUAGES = {
    "numbers": ("Napiši broj {x} riječima.", "Írd le betűvel a {x} számot.", "Viết số {x} bằng chữ."),
    "spelling": (
        "Ispravi pravopis ove riječi: {x}",
        "Javítsd ki ennek a szónak a helyesírását: {x}",
        "Sửa lỗi chính tả của từ này: {x}",
    ),
    "SQL": (
        "Napiši SQL upit: {b} iz tablice {t} gdje je {c} veće od {n}.",
        "Írj SQL lekérdezést: {b} a(z) {t} táblából, ahol {c} nagyobb, mint {n}.",
        "Viết truy vấn SQL: {b} từ bảng {t} với {c} lớn hơn {n}.",
    ),
}
"""Croatian, Hungarian, Vietnamese: not in the library's table of words."""
KNOWN_LANGUAGES = {
    "numbers": (
        "Gib mir {x} als Zahlwort.",
        "Quel est le nom du nombre {x} ?",
        "Necesito {x} en palabras para un cheque.",
        "Scrivi {x} senza cifre.",
        "Qual é {x} escrito com letras?",
        "Wat is {x} in letters?",
        "Jak brzmi {x} w słowach?",
        "Какими словами записать {x}?",
    ),
    "spelling": (
        "Da ist ein Fehler in {x}, wie heißt es richtig?",
        "{x} est mal écrit. Corrige.",
        "Revisa la ortografía de {x}.",
        "Qual è la grafia corretta di {x}?",
        "Há um erro em {x}. Escreve bem.",
        "Klopt de spelling van {x}?",
        "W słowie {x} jest błąd, jak ma być?",
        "Есть ли ошибка в слове {x}?",
    ),
    "SQL": (
        "SQL für {b} aller {t} mit {c} unter {n}, bitte.",
        "Requête pour obtenir {b} de {t} si {c} vaut {n}",
        "Dame el SQL: {b} de {t}, ordenados por {c}.",
        "Query SQL che conta {t} per {b}",
        "Preciso de SQL para somar {c} de {t}.",
        "Geef SQL: hoeveel {t} per {b}?",
        "Zapytanie SQL zliczające {t} według {c}",
        "SQL для выборки {b} из {t}, где {c} меньше {n}",
    ),
}
_HR = ("vremenu", "mojoj mački", "praznicima", "glazbi", "vrtu", "večeri", "ispitu", "vlaku")
_HU = ("az időjárásról", "a macskámról", "a nyaralásról", "a zenéről", "a kertről", "a vacsoráról", "a vizsgáról")
_VI = ("thời tiết", "con mèo", "kỳ nghỉ", "âm nhạc", "khu vườn", "bữa tối", "kỳ thi", "tàu hỏa")
_HE = ("מזג האוויר", "החתול שלי", "החופשה", "מוזיקה", "הגינה", "ארוחת הערב")
_DA = ("vejret", "min kat", "ferien", "musikken", "haven", "aftensmaden", "eksamen", "toget")
_UK = ("погоду", "мого кота", "відпустку", "музику", "сад", "вечерю", "іспит", "потяг")
_RO = ("vremea", "pisica mea", "vacanța", "muzica", "grădina", "cina", "examenul", "trenul")
_TOPICS = (
    "sailing", "beekeeping", "jazz", "pottery", "opera", "skiing", "candles", "owls", "lighthouses", "knitting", "glaciers",
    "perfume", "marathons", "mushrooms", "puppets", "lava", "tango", "hedgehogs", "kites", "cathedrals",
)  # fmt: skip
_WHO = (
    "Nora",
    "Elias",
    "my aunt",
    "the landlord",
    "Ms Okafor",
    "the twins",
    "our coach",
    "Viktor",
    "the plumber",
    "Yuki",
)
_TOOLS = (
    "Docker",
    "PHP",
    "Swift",
    "React",
    "Kubernetes",
    "TypeScript",
    "Scala",
    "Git",
    "Terraform",
    "Lua",
    "NumPy",
    "Vim",
)
_NAMES = ("user", "cart", "node", "token", "frame", "player", "cell", "job", "packet", "theme", "zone", "shape")
_FLATS = (
    "Bright two-room flat on the third floor.", "Heating is included in the rent.", "Pets are allowed on request.", "The balcony faces south.",
    "Available from the first of March.", "No lift, bicycles in the yard.", "Shops and a tram stop nearby.", "A deposit of two months is asked for.",
    "The kitchen was renovated last year.", "Viewings by appointment only.",
)  # fmt: skip
_MANUAL = (
    "Unplug the device before cleaning it.", "Press and hold the power button for five seconds.", "The lamp flashes red when the filter is full.",
    "Keep out of reach of children.", "Use only the cable that came in the box.", "Fill the tank up to the line.", "Do not cover the vents.",
    "Replace the battery once a year.", "Wait until the light turns green.", "Turn the dial to the left.",
)  # fmt: skip
_OBITUARY = (
    "She is survived by two sons and a sister.", "He taught at the village school for forty years.", "A service will be held on Saturday.",
    "Friends remember his laughter and his garden.", "She left home at seventeen to join the navy.", "In lieu of flowers, donations are welcome.",
    "He was a devoted husband and a keen angler.", "Born in a small town, she never lost her accent.",
)  # fmt: skip
_CUSTOMER = (
    "I ordered the blue one and got the red one.", "Where is my refund?", "The app logs me out every day.", "Your agent hung up on me.",
    "I would like to cancel my subscription.", "The coupon does not work.", "Nobody answered my last message.", "The courier left it in the rain.",
    "Please change my delivery address.", "I was charged twice.",
)  # fmt: skip
_SENTENCES = (
    "Our bus was late again this morning.", "The bakery on the corner has closed.", "He plays the cello in a small orchestra.", "They painted the fence green.",
    "Nobody expected such a storm.", "The meeting has been moved to Tuesday.", "My neighbour keeps three hens.", "The soup was far too salty.",
    "A parcel is waiting at the post office.", "She walked home along the canal.",
)  # fmt: skip
_AFRESH = (
    "thanks a lot",
    "sounds good",
    "call me",
    "tomorrow?",
    "nope",
    "who is it",
    "great job",
    "one moment",
    "same here",
    "wait",
    "good luck",
    "any news",
    "be right there",
    "cheers",
    "whatever",
    "come in",
)


def _account(rng: Random) -> str:
    groups = [str(rng.randint(10 ** (size - 1), 10**size - 1)) for size in rng.choices((2, 3, 4), k=rng.randint(3, 7))]
    return rng.choice((" ", "-", " ", "/")).join(groups)


def _stutter(rng: Random) -> str:
    return rng.choice((" ", ", ", "... ", "")).join(
        [rng.choice(("no", "la", "wow", "row", "bla", "hey", "up", "Z", "42", "??"))] * rng.randint(4, 25)
    )


UNKNOWN: dict[str, tuple[Callable[[Random], str], tuple[str, ...]]] = {
    "Croatian": (filled("Pričaj mi o {x}.", "Što misliš o {x}?", "Napiši {m} rečenica o {x}.", "Danas razmišljam o {x}.", x=_HR),
                 ("other Latin script", "slavic in Latin script, Hungarian, Romanian", "requests in Polish and Czech")),
    "Hungarian": (filled("Mesélj {x}!", "Mit gondolsz {x}?", "Írj {m} mondatot {x}.", "Nem tudok semmit {x}.", x=_HU),
                  ("other Latin script", "slavic in Latin script, Hungarian, Romanian", "nordic and baltic")),
    "Vietnamese": (filled("Kể cho tôi nghe về {x}.", "Bạn nghĩ gì về {x}?", "Viết {m} câu về {x}.", "Tại sao {x} lại quan trọng?", x=_VI),
                   ("other Latin script", "languages of Africa and Asia in Latin script")),
    "Hebrew": (filled("ספר לי על {x}.", "מה אתה חושב על {x}?", "כתוב {m} משפטים על {x}.", "היום אני חושב על {x}.", x=_HE), ("Arabic, Hebrew, Devanagari",)),
    "Danish": (filled("Hvad ved du om {x}?", "Giv mig {m} gode råd om {x}.", "Jeg glæder mig til {x}.", "Kan du hjælpe mig med {x}?", "Er {x} dyrt?", x=_DA),
               ("germanic", "nordic and baltic", "requests in German", "requests in Dutch")),
    "Ukrainian": (filled("Що ти знаєш про {x}?", "Дай {m} порад про {x}.", "Чому всі говорять про {x}?", "Допоможи мені зрозуміти {x}.", x=_UK),
                  ("Cyrillic and Greek", "requests in Russian")),
    "Romanian": (filled("Ce știi despre {x}?", "Dă-mi {m} sfaturi despre {x}.", "Toți vorbesc despre {x}.", "Ajută-mă cu {x}, te rog.", x=_RO),
                 ("romance", "requests in French", "requests in Spanish", "requests in Italian and Portuguese", "slavic in Latin script, Hungarian, Romanian")),
    "developers' questions": (filled("Is {y} still worth learning?", "{y} throws error {m} when I open a {x}.", "How big can a {x} get in {y}?",
                              "Set up {y} on a fresh laptop, please.", "Why does my {y} {x} leak memory?", "Compare {y} and {z} for a small {x} service.",
                              x=_NAMES, y=_TOOLS, z=_TOOLS), ("questions about code", "code", "programming help", "computers")),
    "program text": (filled("fn {x}({y}: u{m}) -> bool {{ {y} > {n} }}", "class {x} extends {y} {{ size = {n}; }}", "if [ -f {x}.{y} ]; then rm {x}.{y}; fi",
                     "export default ({x}) => {x}.{y} ?? {n}", "def {x}(self, {y}={n}): return self.{y} + {m}", "{x}->{y}[{m}] = malloc({n});", x=_NAMES, y=_NAMES),
                     ("code", "data and markup", "logs and addresses")),
    "settings in files": (filled("[{x}]\n{y} = {n}\n{z} = \"{y}\"", "{x}.{y}.{z}={n}", "<{x} {y}=\"{n}\"><{z}/></{x}>", "{x}: {{{y}: {n}, {z}: [{m}, {n}]}}",
                          "{x};{y};{z}\n{n};{m};{n}", x=_NAMES, y=_NAMES, z=_NAMES), ("data and markup", "logs and addresses", "code")),
    "flats to let": (sampled(_FLATS, 2, 4), ("adverts and headlines", "legal and official", "letters and e-mails")),
    "instruction manuals": (sampled(_MANUAL, 2, 4), ("recipes and instructions", "legal and official", "advice and opinions")),
    "obituaries": (sampled(_OBITUARY, 2, 4), ("news", "narrative", "encyclopedic", "facts and people")),
    "complaints": (sampled(_CUSTOMER, 1, 3), ("reviews and mail", "letters and e-mails", "everyday statements")),
    "account numbers": (_account, ("random characters", "unknown words", "key mashing", "random tokens")),
    "letters in a heap": (characters(string.ascii_lowercase + "  ", 8, 50), ("random characters", "unknown words", "key mashing", "random tokens")),
    "stutter": (_stutter, ("repetitions", "random words")),
    "hobby questions": (filled("How do I get started with {x}?", "What is the history of {x}?", "Are there clubs for {x} in my town?", "How dangerous is {x}?",
                        "Name {m} famous people known for {x}.", x=_TOPICS), ("questions", "advice and opinions", "facts and people", "science and medicine")),
    "gossip about people": (filled("{x} moved in with {y} last week.", "Did you hear that {x} won {m} euros?", "{x} never talks to {y}.", "I saw {x} and {y} at the station.",
                            "Ask {x} whether {y} is coming.", x=_WHO, y=_WHO), ("small talk", "everyday statements")),
    "short replies": (lambda rng: rng.choice(("", "", "ok, ", "well, ", "oh, ", "hm, ")) + rng.choice(_AFRESH) + rng.choice(("", "!", "...", ".")), ("very short", "small talk")),
    "texts to be worked on": (filled("Shorten to {m} characters: {x}", "Is the following a fact or an opinion? {x}", "{x} Ask me a question about it.", "Retell as a joke: {x}",
                              "Who might have said this? {x}", "Continue: {x}", x=_SENTENCES), ("requests about a text", "text work")),
    "stories wanted": (filled("Write a scary story about {x}.", "Invent a legend on {x} and {y}.", "A limerick about {x}, please.", "Write a dialogue between {y} and {x}.",
                       "Begin a novel with {x}.", x=_TOPICS, y=_TOPICS), ("writing requests", "role play and fiction", "quotes and verse")),
}  # fmt: skip
"""Name → maker, and background families like it."""
NEAR = {
    "numbers": ("Is {x} divisible by seven?", "Round {x} down.", "What is {x} in hexadecimal?", "Who lives at number {x}?", "Count from {x} to {n}.", "Is {x} an even number?"),
    "spelling": ("What is the origin of {x}?", "Give the plural of {x}.", "Put {x} into a sentence.", "How is {x} pronounced?", "Name three words like {x}.", "Translate {x} into Polish."),
    "SQL": ("Which chart suits {c} of {t} per {b}?", "Write a Python script that reads {t} from a CSV file.", "Who may see the {c} of our {t}?",
            "Summarise why {t} need a {c}.", "How large will the table {t} be after {n} {u}?", "Explain what an index on {c} does."),
}  # fmt: skip


def report_sets(size: int, seed: int) -> dict[str, PromptSet]:
    """Name → set of ``size`` prompts."""
    words, sets = misspelt_words(), {}

    def draw(task: str, forms: Sequence[str]) -> Callable[[Random], str]:
        return lambda rng: rng.choice(forms).format(x=item(task, rng, words), **sql_parts(rng))

    for number, task in enumerate(TASKS):
        seen = draw(task, (SEEN[task],))
        makers = {
            "seen": seen,
            "wording": draw(task, WORDINGS[task]),
            "typos": lambda rng, seen=seen: mistyped_in_haste(seen(rng), rng),
            "language": draw(task, LANGUAGES[task]),
            "language of the table": draw(task, KNOWN_LANGUAGES[task]),
        }
        for kind, maker in makers.items():
            sets[f"{task}, {kind}"] = PromptSet(kind, number, distinct(maker, size, f"{seed} report {task} {kind}"), ())
    for name, (maker, families) in UNKNOWN.items():
        sets[name] = PromptSet("far", -1, distinct(maker, size, f"{seed} report {name}"), families)
    for task, forms in NEAR.items():
        prompts = distinct(draw(task, forms), size, f"{seed} report near {task}")
        sets[f"near {task}"] = PromptSet("near", -1, prompts, ())
    return sets
