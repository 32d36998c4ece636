# ruff: noqa: E501
"""Prompt sets for the gate: three known tasks, what is unknown, and two collections of each.

``collection="development"`` is what the rule may be developed on. ``collection="held out"`` has other wordings, other
languages, another maker of typos and other unknown kinds; it was looked at with an earlier rule. ``collection="fresh"``
has others again, written after the rule of that day was fixed and looked at since; ``collection="later"`` was written
after translated copies were added.
Everything follows from the seed. Misspelt words are those of the package codespell (CC BY-SA 3.0).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from importlib.resources import files
from random import Random
from typing import NamedTuple

TASKS = ("numbers", "spelling", "SQL")
SEEN = {
    "numbers": "Write {x} in words.",
    "spelling": "Correct the spelling of this word: {x}",
    "SQL": "Write an SQL query for this: {x}",
}
WORDINGS = {
    "development": {
        "numbers": (
            "How do you spell the number {x}?",
            "Spell out {x}.",
            "{x} as text please",
            "I have to write {x} on a cheque. What are the words?",
            "What is {x} when written out?",
            "Convert the digits {x} to English words.",
        ),
        "spelling": (
            "How is {x} spelled correctly?",
            "Fix the typo: {x}",
            "{x} - is that spelled right?",
            "My spell checker marks {x}. What should it be?",
            "There is a mistake in the word {x}, please repair it.",
            "Which letters are wrong in {x}?",
        ),
        "SQL": (
            "I need a database query. {x}",
            "{x} Give me the SELECT statement.",
            "What would the SQL look like? {x}",
            "Turn this into SQL: {x}",
            "Using SQL, how do I get this? {x}",
            "Query, please: {x}",
        ),
    },
    "held out": {
        "numbers": (
            "Put the figure {x} into words.",
            "How would you say {x} out loud?",
            "Number to words: {x}",
            "Please read {x} to me as words.",
            "Replace the digits by words: {x}",
            "The invoice says {x}. Write that amount out in full.",
            "{x}, but in letters instead of digits",
        ),
        "spelling": (
            "What is the right way to write {x}?",
            "I typed {x}. What is the proper word?",
            "Correct this: {x}",
            "{x} looks wrong. How should it be written?",
            "Proofread the word {x}.",
            "Did you mean something else than {x}? Give the correct spelling.",
            "Spelling check: {x}",
        ),
        "SQL": (
            "Help me with a select for my database. {x}",
            "Express this request in SQL. {x}",
            "{x} How do I write that as a query?",
            "Our DBA wants a statement for the following. {x}",
            "Postgres query for this? {x}",
            "sql: {x}",
            "Write the statement that returns it: {x}",
        ),
    },
    "fresh": {
        "numbers": (
            "Turn {x} into words, please.",
            "What is the written form of {x}?",
            "Type out {x} using letters only.",
            "I need {x} in full words for a form.",
            "Digits to words, please: {x}",
            "Which words stand for {x}?",
            "A child asks how {x} is read. Tell me.",
            "Name this number in English: {x}",
        ),
        "spelling": (
            "Can you check the spelling of {x}?",
            "{x} is misspelt. What is right?",
            "Spell {x} properly.",
            "I wrote {x}, but it seems to contain an error.",
            "Find the typing error: {x}",
            "What word did I mean by {x}?",
            "The correct spelling for {x}, please.",
            "Repair this word: {x}",
        ),
        "SQL": (
            "Which SQL do I run for this? {x}",
            "Our table needs a query. {x}",
            "{x} Please answer with SQL only.",
            "As a database expert, translate: {x}",
            "SQLite command for: {x}",
            "Formulate in SQL - {x}",
            "Could you give me a statement to get {x}",
        ),
    },
    "later": {
        "numbers": (
            "Please spell the figure {x} in letters.",
            "How is {x} pronounced in words?",
            "{x} -> text",
            "My bank wants {x} written out.",
            "What do you call the number {x}?",
            "Change {x} from digits into words.",
            "Verbalise {x}.",
        ),
        "spelling": (
            "{x}: what is the proper spelling?",
            "Please correct {x}.",
            "I am unsure how to spell {x}.",
            "Someone typed {x} wrongly. Put it right.",
            "Spellcheck {x} for me.",
            "Which word was meant, {x}?",
            "Show the right letters for {x}.",
        ),
        "SQL": (
            "Compose an SQL statement. {x}",
            "{x} What query does that?",
            "For my database I need: {x}",
            "In SQL, please: {x}",
            "Make a SELECT or other statement of this. {x}",
            "MySQL, how? {x}",
            "Produce the query: {x}",
        ),
    },
}
LANGUAGES = {
    "development": {
        "numbers": ("Schreibe die Zahl {x} in Worten.", "Écris le nombre {x} en lettres.", "Escribe {x} con palabras."),
        "spelling": (
            "Korrigiere die Rechtschreibung dieses Wortes: {x}",
            "Corrige l'orthographe de ce mot : {x}",
            "Corrige la ortografía de esta palabra: {x}",
        ),
        "SQL": (
            ("Schreibe eine SQL-Abfrage: alle {b} der Tabelle {t}, deren {c} größer als {n} ist.",)
            + ("Écris une requête SQL : les {b} de la table {t} où {c} dépasse {n}.",)
            + ("Escribe una consulta SQL: {b} de la tabla {t} con {c} mayor que {n}.",)
        ),
    },
    "held out": {
        "numbers": ("Scrivi il numero {x} in lettere.", "Escreve {x} por extenso.", "Schrijf {x} in woorden."),
        "spelling": (
            "Correggi l'ortografia di questa parola: {x}",
            "Corrige a ortografia desta palavra: {x}",
            "Verbeter de spelling van dit woord: {x}",
        ),
        "SQL": (
            ("Scrivi una query SQL: {b} dalla tabella {t} dove {c} è maggiore di {n}.",)
            + ("Escreve uma consulta SQL: {b} da tabela {t} onde {c} é maior que {n}.",)
            + ("Schrijf een SQL-query: {b} uit de tabel {t} waar {c} groter is dan {n}.",)
        ),
    },
    "fresh": {
        "numbers": (
            "Skriv tallet {x} med bogstaver.",
            "Scrie numărul {x} în litere.",
            "Escriu el número {x} amb lletres.",
        ),
        "spelling": (
            "Ret stavningen af dette ord: {x}",
            "Corectează ortografia acestui cuvânt: {x}",
            "Corregeix l'ortografia d'aquesta paraula: {x}",
        ),
        "SQL": (
            "Skriv en SQL-forespørgsel: {b} fra tabellen {t}, hvor {c} er over {n}.",
            "Scrie o interogare SQL: {b} din tabelul {t} unde {c} este mai mare decât {n}.",
            "Escriu una consulta SQL: {b} de la taula {t} on {c} supera {n}.",
        ),
    },
    "later": {
        "numbers": ("Napiš číslo {x} slovy.", "Tulis angka {x} dengan huruf.", "Skriv tallet {x} med ord."),
        "spelling": (
            "Oprav pravopis tohoto slova: {x}",
            "Perbaiki ejaan kata ini: {x}",
            "Rett skrivemåten av dette ordet: {x}",
        ),
        "SQL": (
            "Napiš SQL dotaz: {b} z tabulky {t}, kde {c} je větší než {n}.",
            "Tulis kueri SQL: {b} dari tabel {t} dengan {c} lebih dari {n}.",
            "Skriv en SQL-spørring: {b} fra tabellen {t} der {c} er over {n}.",
        ),
    },
}
KNOWN_LANGUAGES = {
    "numbers": ("Wie schreibt man {x} aus?", "¿Cómo se escribe {x} en letras?", "{x} in lettere, per favore"),
    "spelling": ("Wie schreibt man {x} richtig?", "¿Está bien escrito {x}?", "Come si scrive {x} correttamente?"),
    "SQL": (
        "Ich brauche SQL: {b} aus {t}, wo {c} über {n} liegt.",
        "¿Qué consulta SQL da {b} de {t} con {c} menor que {n}?",
        "Mi serve una query SQL per {b} di {t} con {c} sopra {n}.",
    ),
}
"""Other phrases, in languages that the library's table of words has; part of the collection ``later``."""
_TABLES = (
    "orders",
    "customers",
    "employees",
    "products",
    "invoices",
    "students",
    "flights",
    "books",
    "payments",
    "sensors",
)
_COLUMNS = (
    "price",
    "age",
    "city",
    "salary",
    "date",
    "weight",
    "score",
    "status",
    "name",
    "quantity",
    "rating",
    "country",
)
_ASKED = (
    "all rows of {t} where {c} is greater than {n}",
    "the average {c} of {t} for each {b}",
    "how many {t} have {c} below {n}",
    "the ten {t} with the highest {c}",
    "{b} and {c} from {t}, sorted by {c}",
    "the number of {t} per {b}",
    "delete {t} whose {c} is {n}",
    "{t} joined with {u} on {b}",
)


class PromptSet(NamedTuple):
    """Prompts of one kind."""

    kind: str
    """``seen``, ``wording``, ``typos``, ``language``, ``far`` or ``near``."""

    task: int
    """Number of the task; -1 for unknown ones."""

    prompts: list[str]

    families: tuple[str, ...]
    """Background families like this set, which are left out where a set is judged as one that nothing was fitted on."""


def misspelt_words() -> list[str]:
    """Misspelt words of five letters and more."""
    lines = (files("codespell_lib") / "data" / "dictionary.txt").read_text(encoding="utf-8").splitlines()
    return [word for word in (line.split("->")[0] for line in lines) if len(word) >= 5 and word.isalpha()]


def item(task: str, rng: Random, words: Sequence[str]) -> str:
    """What a prompt of the task is about."""
    if task == "numbers":
        return str(rng.randint(10, 10 ** rng.randint(2, 6)))
    if task == "spelling":
        return rng.choice(words)
    text = rng.choice(_ASKED).format(**sql_parts(rng))
    return text[0].upper() + text[1:] + "."


def sql_parts(rng: Random) -> dict[str, object]:
    b, c = rng.sample(_COLUMNS, 2)
    t, u = rng.sample(_TABLES, 2)
    return {"b": b, "c": c, "t": t, "u": u, "n": rng.randint(1, 5000)}


def calibration_prompts(size: int, seed: int) -> tuple[list[str], list[int]]:
    """Prompts in the seen wording and their tasks' numbers, ``size`` a task."""
    texts: list[str] = []
    for task in TASKS:
        texts += distinct(lambda rng, task=task: SEEN[task].format(x=item(task, rng, _words())), size, f"{seed} {task}")
    return texts, [number for number in range(len(TASKS)) for _ in range(size)]


_kept_words: list[str] = []


def _words() -> list[str]:
    if not _kept_words:
        _kept_words.extend(misspelt_words())
    return _kept_words


def distinct(draw: Callable[[Random], str], size: int, seed: str) -> list[str]:
    rng, found = Random(seed), {}
    for _ in range(60 * size):
        found[draw(rng)] = None
        if len(found) == size:
            break
    return list(found)


def mistyped(text: str, rng: Random) -> str:
    """One letter in ten replaced, left out or doubled (development)."""
    out = []
    for letter in text:
        if letter.isalpha() and rng.random() < 0.1:
            out.append(rng.choice(("", letter * 2, rng.choice(string.ascii_lowercase))))
        else:
            out.append(letter)
    return "".join(out)


_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def mistyped_on_keys(text: str, rng: Random) -> str:
    """One letter in ten is a neighbour on the keyboard, or changes places with the next one (held out)."""
    letters = list(text)
    for place, letter in enumerate(letters):
        if not letter.isalpha() or rng.random() > 0.1:
            continue
        row = next((row for row in _ROWS if letter.lower() in row), None)
        if row is not None and rng.random() < 0.6:
            at = row.index(letter.lower())
            letters[place] = row[max(0, min(len(row) - 1, at + rng.choice((-1, 1))))]
        elif place + 1 < len(letters):
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return "".join(letters)


def mistyped_in_haste(text: str, rng: Random) -> str:
    """Spaces missing or moved, letters missing, capital letters lost (fresh)."""
    out = []
    for letter in text.lower() if rng.random() < 0.5 else text:
        chance = rng.random()
        if letter == " " and chance < 0.15:
            continue
        if letter.isalpha() and chance < 0.06:
            continue
        out.append(letter * 2 if letter.isalpha() and chance > 0.96 else letter)
    return "".join(out)


def prompt_sets(collection: str, size: int, seed: int) -> dict[str, PromptSet]:
    """Name → set of at most ``size`` prompts."""
    sets: dict[str, PromptSet] = {}
    typos = {
        "development": mistyped,
        "held out": mistyped_on_keys,
        "fresh": mistyped_in_haste,
        "later": mistyped_on_keys,
    }[collection]
    for number, task in enumerate(TASKS):

        def draw(forms: Sequence[str], task: str = task) -> Callable[[Random], str]:
            return lambda rng: rng.choice(forms).format(x=item(task, rng, _words()), **sql_parts(rng))

        seen = draw((SEEN[task],))
        makers = {
            "seen": seen,
            "wording": draw(WORDINGS[collection][task]),
            "typos": lambda rng, seen=seen: typos(seen(rng), rng),
            "language": draw(LANGUAGES[collection][task]),
        }
        if collection == "later":
            makers["language of the table"] = draw(KNOWN_LANGUAGES[task])
        for kind, maker in makers.items():
            prompts = distinct(maker, size, f"{seed} {collection} {task} {kind}")
            sets[f"{task}, {kind}"] = PromptSet(kind, number, prompts, ())
    for name, (kind, maker, families) in _UNKNOWN[collection].items():
        prompts = distinct(maker, size, f"{seed} {collection} {name}")
        sets[name] = PromptSet(kind, -1, prompts, families)
    return sets


def filled(*forms: str, **slots: Sequence[str]) -> Callable[[Random], str]:
    def draw(rng: Random) -> str:
        chosen = {name: rng.choice(values) for name, values in slots.items()}
        return rng.choice(forms).format(n=rng.randint(2, 9999), m=rng.randint(2, 99), **chosen)

    return draw


def sampled(sentences: Sequence[str], least: int, most: int) -> Callable[[Random], str]:
    return lambda rng: " ".join(rng.sample(list(sentences), rng.randint(least, most)))


def _on_items(task: str, *forms: str) -> Callable[[Random], str]:
    return lambda rng: rng.choice(forms).format(x=item(task, rng, _words()), **sql_parts(rng))


def characters(alphabet: str, least: int, most: int) -> Callable[[Random], str]:
    return lambda rng: "".join(rng.choice(alphabet) for _ in range(rng.randint(least, most))).strip() or "q"


_COUNTRIES = [
    "France",
    "Japan",
    "Peru",
    "Kenya",
    "Norway",
    "Egypt",
    "Chile",
    "Poland",
    "India",
    "Cuba",
    "Ghana",
    "Iran",
    "Iraq",
    "Italy",
    "Spain",
    "Nepal",
    "Qatar",
    "Malta",
    "Mexico",
    "Canada",
    "Brazil",
    "Sweden",
    "Turkey",
    "Greece",
    "Latvia",
    "Jordan",
    "Angola",
    "Belize",
    "Bhutan",
    "Cyprus",
    "Fiji",
    "Gabon",
    "Guinea",
    "Haiti",
    "Kuwait",
    "Laos",
    "Libya",
    "Mali",
    "Monaco",
    "Nauru",
    "Niger",
    "Oman",
    "Panama",
    "Rwanda",
    "Samoa",
    "Serbia",
    "Sudan",
    "Syria",
    "Togo",
    "Tonga",
    "Uganda",
    "Yemen",
    "Zambia",
    "Austria",
    "Bahrain",
    "Belgium",
    "Bolivia",
    "Croatia",
    "Denmark",
    "Ecuador",
    "Estonia",
    "Finland",
    "Georgia",
    "Germany",
    "Hungary",
    "Iceland",
    "Ireland",
    "Israel",
]
_THINGS = [
    "bread",
    "soup",
    "gardening",
    "running",
    "sleep",
    "trains",
    "whales",
    "volcanoes",
    "tea",
    "guitars",
    "bees",
    "money",
    "taxes",
    "winter",
    "football",
    "history",
    "clocks",
    "rivers",
    "castles",
    "robots",
    "painting",
    "chess",
    "wolves",
    "ships",
    "cheese",
    "rice",
    "stars",
    "stamps",
    "bicycles",
    "coffee",
]
_LANGS = ("Python", "Java", "C", "JavaScript", "Rust", "Go", "Ruby", "Haskell", "Perl", "Kotlin")
_NAMES = ("Anna", "Ben", "Mr Lopez", "Dr Shah", "the mayor", "the union", "our team", "the museum", "a witness")
_DE = ("das Abendessen", "den Urlaub", "meine Katze", "das Wetter", "ein Geschenk", "den Garten", "die Prüfung")
_FR = ("le dîner", "les vacances", "mon chat", "la météo", "un cadeau", "le jardin", "mon examen", "la musique")
_ZH = ("天气", "晚饭", "旅行", "音乐", "电影", "猫", "工作", "考试", "足球", "春天")
_RU = ("погоде", "ужине", "поездке", "музыке", "фильмах", "кошках", "работе", "экзамене", "футболе")
_IT = ("la cena", "le vacanze", "il mio gatto", "il tempo", "un regalo", "il giardino", "l'esame", "la musica")
_SV = ("middagen", "semestern", "min katt", "vädret", "en present", "trädgården", "provet", "musiken")
_PL = ("kolacji", "wakacjach", "moim kocie", "pogodzie", "prezencie", "ogrodzie", "egzaminie", "muzyce")
_JA = ("天気", "夕食", "旅行", "音楽", "映画", "猫", "仕事", "試験", "サッカー", "春")
_AR = ("الطقس", "العشاء", "السفر", "الموسيقى", "الأفلام", "القطط", "العمل", "الامتحان", "كرة القدم")

_NEWS = (
    "The port authority said on Monday that freight traffic had recovered.",
    "Heavy snow closed two mountain passes overnight.",
    "Voters rejected the proposal by a narrow margin.",
    "The airline will add three daily flights from June.",
    "Firefighters brought the blaze under control before dawn.",
    "Analysts had expected a larger rise in profits.",
    "The suspect was released without charge.",
    "A rare stamp was sold for a record sum at an auction.",
    "The home team won after extra time.",
    "Rents in the capital have risen for the ninth year in a row.",
    "The minister promised to publish the report in autumn.",
    "Scientists described a new species of frog.",
)
_STORIES = (
    "Mira held the lantern higher and counted the steps.",
    "Nobody in the village remembered who had planted the oak.",
    "The captain folded the map and said nothing for a while.",
    "It was raining when the stranger asked for a room.",
    "The cat looked at the empty bowl and then at him.",
    "They had promised to meet again under the clock.",
    "A door slammed somewhere above them.",
    "His hands shook as he opened the parcel.",
    "The train whistled twice and was gone.",
    "She had always been afraid of deep water.",
)
_RECIPES = (
    "Chop the onions and fry them in butter until golden.",
    "Whisk two eggs with a pinch of salt.",
    "Let the dough rest for half an hour under a cloth.",
    "Bake at medium heat for forty minutes.",
    "Add the stock and simmer gently.",
    "Season with pepper, nutmeg and lemon juice.",
    "Drain the pasta and keep a cup of the water.",
    "Serve with fresh parsley.",
)
_LEGAL = (
    "The tenant shall return the keys on the day of termination.",
    "Either party may terminate this agreement with three months' notice in writing.",
    "The supplier is liable for damage caused by gross negligence only.",
    "All disputes are subject to the laws of the place of delivery.",
    "Personal data shall be erased when the purpose of their processing has ceased.",
    "The deposit is refunded within thirty days.",
    "Amendments to this contract require the written form.",
    "Should a provision be void, the remaining provisions stay in force.",
)
_SCIENCE = (
    "We measured the absorption spectra at four temperatures.",
    "The samples were centrifuged and stored on ice.",
    "Neurons in this layer respond to moving edges.",
    "Our results are consistent with earlier field studies.",
    "The reaction is catalysed by traces of palladium.",
    "No significant difference between the groups was found.",
    "Sediment cores were taken from eleven lakes.",
    "The mutation affects the folding of the protein.",
)
_TALK = (
    "I slept badly.", "What a day!", "How have you been?", "My bus was late again.", "Do you ever get tired?",
    "I love rainy days.", "Tell me a joke.", "You made me smile.", "My knee hurts a bit.", "We won the match!",
    "I miss my grandmother.", "Have you got any plans for tonight?", "That went better than expected.", "Good evening!",
    "I finally finished that book.", "My boss is driving me mad.", "Are you still there?", "Let's be friends.",
)  # fmt: skip
_SHORT = (
    "ok", "hey", "later", "fine", "no way", "really?", "hmm", "9", "77", "green", "go", "left", "??", "thx", "sup", "ten",
    "why not", "dog", "and?", "Friday", "yep", "wow", "morning", "continue", "reset", "cat", "b", "Z", "0", "tell me",
    "listen", "enough", "again?", "true", "false", "none", "hello", "food", "water", "what now", "beep", "one more",
    "nothing", "me too", "same", "look", "run", "quick", "slow", "red", "sun", "fish", "door", "lamp", "end", "begin",
    "exit", "open", "close", "up",
)  # fmt: skip
_SHORT_HELD_OUT = (
    "ciao", "aha", "right", "wrong", "3", "1000", "so?", "when", "where", "how", "music", "purple", "k", "Q", "!", "--", "idk",
    "brb", "omg", "ugh", "oops", "cheers", "welcome", "Monday", "snow", "milk", "shoe", "bird", "key", "north", "east", "try",
    "skip", "undo", "save", "print", "back", "forward", "louder", "faster", "later then", "not now", "do it", "I see", "got it",
    "of course", "never", "always", "today", "tomorrow", "half", "double", "empty", "full", "hot", "cold", "old", "new", "my name",
    "who dat",
)  # fmt: skip
_SENTENCES = (
    "The meeting starts at nine and all heads of department should attend.",
    "i cant find my charger anywhere",
    "We are sorry that your parcel was damaged on its way.",
    "The hotel was nice but the street was noisy at night.",
    "Our students planted forty trees behind the school.",
    "Please do not lean your bicycles against this wall.",
    "He had worked for the railway all his life.",
    "The price includes breakfast and parking.",
)
_CS = ("počasí", "kočce", "dovolené", "zkoušce", "hudbě", "zahradě", "večeři")
_ID = ("cuaca", "kucing saya", "liburan", "ujian", "musik", "kebun", "makan malam")
_EL = ("τον καιρό", "τη γάτα μου", "τις διακοπές", "τη μουσική", "τον κήπο", "το δείπνο")
_BN = ("আবহাওয়া", "বিড়াল", "ছুটি", "পরীক্ষা", "গান", "বাগান")
_MUSEUM = (
    "Oil on canvas, about 1640.", "The bowl was found in a grave near the river.", "Gift of the Hartmann family.",
    "The mask was worn at harvest festivals.", "Only three copies of this print survive.", "Please do not touch the exhibits.",
    "The sculptor worked in marble and limewood.", "Room 4 shows tools of the late bronze age.",
)  # fmt: skip
_CAMPING = (
    "Pitch the tent on level ground.", "Let the stove cool down before you refill it.", "Tie your food up in a tree.",
    "A second pair of socks is worth its weight.", "Boil water from the stream for five minutes.",
    "Check the forecast before you set out.", "Put out the fire with sand.", "Leave nothing behind.",
)  # fmt: skip
_DEVICE = (
    "Set a timer for ten minutes.", "Turn the lights off in the kitchen.", "Play some jazz.", "Call my sister.", "Volume up.",
    "Wake me at seven.", "Navigate home.", "Add butter to the shopping list.", "Skip this song.", "Lock the front door.",
    "What is on my calendar today?", "Remind me to call the dentist.", "Stop the vacuum cleaner.", "Take a photo.",
    "Open the garage.", "Make it warmer in here.", "Silence all calls.", "Read me the news.", "Start the washing machine.",
    "Find my phone.", "Dim the lamp a little.", "Good night, switch everything off.",
)  # fmt: skip
_DA = ("vejret", "min kat", "ferien", "en gave", "eksamen", "musikken", "haven", "middagen")
_RO = ("vremea", "pisica mea", "vacanța", "un cadou", "examenul", "muzica", "grădina", "cina")
_UK = ("погоду", "відпустку", "кота", "роботу", "музику", "подарунок", "іспит", "вечерю")
_TH = ("อากาศ", "แมว", "วันหยุด", "ดนตรี", "งาน", "อาหารเย็น", "สวน")
_INSURANCE = (
    "The policy does not cover damage caused by frost.", "Claims are to be reported within five working days.",
    "The insured sum is reviewed every year.", "Theft from an unlocked vehicle is excluded.",
    "A deductible of 300 applies to each event.", "Cover begins at noon on the day stated in the certificate.",
    "The insurer may demand proof of purchase.", "Premiums are paid in advance.",
)  # fmt: skip
_HOROSCOPES = (
    "A surprise awaits you in the evening.", "Do not let others decide for you this week.", "Love is in the air, so be brave.",
    "Money matters need your attention.", "An old friend will call.", "Trust your instinct at work.",
    "The stars advise rest and warm tea.", "Someone close needs a kind word.",
)  # fmt: skip
_JOBS = (
    "You speak fluent English and enjoy working in a team.", "We offer flexible hours and a company bicycle.",
    "Experience in sales is an advantage.", "Send your papers to the address below.", "The position is limited to two years.",
    "Your tasks include planning tours and looking after guests.", "Start: as soon as possible.", "No previous knowledge needed.",
)  # fmt: skip
_WEATHER = (
    "Fog will clear by late morning.", "Gusts of up to 80 kilometres per hour are possible on the coast.",
    "Highs between 12 and 15 degrees.", "Showers spread from the west in the afternoon.", "The night stays dry and cold.",
    "Thunderstorms are likely in the mountains.", "Sunny spells in the south.", "Snow falls above 900 metres.",
)  # fmt: skip
_REPLIES = (
    "agreed", "sounds good", "no problem", "my bad", "whatever", "as you wish", "not sure", "makes sense", "who knows", "you bet",
    "fair enough", "good point", "never mind", "let me think", "in a minute", "on my way", "forget it", "all good", "too late",
    "say again", "come on", "well done", "same here", "no clue", "almost there", "one second", "be right back", "see above", "as usual",
    "why me", "what a mess", "next week", "at home", "long story", "it depends", "hard to say", "yes and no", "could be", "no worries",
    "ask Tom", "11 am", "room 4", "by bus", "with milk", "two please", "extra large", "left side", "top floor", "half past", "the red one",
    "both", "neither", "anything", "soon", "twice", "alone", "outside", "upstairs", "Sunday", "April",
)  # fmt: skip
_UNKNOWN: dict[str, dict[str, tuple[str, Callable[[Random], str], tuple[str, ...]]]] = {
    "development": {
        "German": ("far", filled("Erzähl mir etwas über {x}.", "Was weißt du über {x}?", "Ich denke oft an {x}.",
                   "Gib mir {m} Tipps für {x}.", "Warum ist {x} so wichtig?", "Was soll ich zu {x} sagen?", x=_DE), ("germanic",)),
        "French": ("far", filled("Parle-moi de {x}.", "Que penses-tu de {x} ?", "Écris un courriel sur {x}.",
                   "Donne-moi {m} conseils pour {x}.", "Pourquoi parler de {x} ?", "J'ai une question sur {x}.", x=_FR), ("romance",)),
        "Chinese": ("far", filled("请谈谈{x}。", "你喜欢{x}吗?", "写一首关于{x}的诗。", "{x}有什么好处?", "给我{m}条关于{x}的建议。",
                    "为什么大家喜欢{x}?", x=_ZH), ("Chinese, Japanese, Korean",)),
        "Russian": ("far", filled("Расскажи о {x}.", "Напиши рассказ о {x}.", "Что ты думаешь о {x}?", "Дай {m} советов о {x}.",
                    "Я много думаю о {x}.", "Поговорим о {x}?", "Зачем говорить о {x}?", x=_RU), ("Cyrillic and Greek",)),
        "code questions": ("far", filled("How do I sort a list of {x} in {y}?", "Why is my {y} loop over {x} slow?",
                           "Write a {y} class that stores {x}.", "What does static mean in {y}?",
                           "Explain this {y} error: index {m} out of range", x=_THINGS, y=_LANGS), ("questions about code", "code")),
        "code": ("far", filled("def {x}(n):\n    return n * {m}", "for (int i = 0; i < {n}; i++) {{ {x}[i] = 0; }}",
                 "let {x} = {n}; console.log({x});", "import {x}\nprint({x}.size)", "if {x} > {m}:\n    {x} -= 1",
                 x=_THINGS), ("code", "questions about code")),
        "news": ("far", sampled(_NEWS, 2, 4), ("news", "encyclopedic", "narrative")),
        "data": ("far", filled('{{"id": {n}, "{x}": "{y}"}}', "{x};{n};{y};{m}", "<{x}><{y}>{n}</{y}></{x}>",
                 "2024-05-{m} 12:{m}:07 WARN {x}: {y} failed ({n})", "https://{x}.example.com/{y}?page={n}",
                 x=_THINGS, y=_THINGS), ("data and markup", "logs and addresses")),
        "characters": ("far", characters(string.ascii_letters + string.digits + "#$%&/ ", 6, 40),
                       ("random characters", "unknown words", "key mashing", "random tokens")),
        "repetitions": ("far", lambda rng: (rng.choice([*_THINGS, "lo", "x", "9", "ok"]) + rng.choice(["", " "])) *
                        rng.randint(5, 30), ("repetitions",)),
        "capitals": ("far", filled("What is the capital of {x}?", x=_COUNTRIES), ("questions",)),
        "stories": ("far", sampled(_STORIES, 1, 3), ("narrative", "news", "encyclopedic")),
        "small talk": ("far", sampled(_TALK, 1, 2), ("small talk",)),
        "very short": ("far", lambda rng: rng.choice(_SHORT), ("very short",)),
        "rewriting": ("far", filled("Rephrase: {x}", "Make this friendlier: {x}", "Summarise in {m} words: {x}",
                      "Put this into reported speech: {x}", "{x} Translate to Dutch.", "Shorten this text: {x}",
                      "Write a reply to this: {x}", "Make a title for: {x}", x=_SENTENCES), ("requests about a text",)),
        "questions": ("far", filled("Why do people like {x}?", "Who invented {x}?", "How expensive is {x} these days?",
                      "What should I know about {x}?", "Is {x} good for children?", x=_THINGS), ("questions", "writing requests")),
        "near numbers": ("near", _on_items("numbers", "What is {x} plus {n}?", "Is {x} divisible by 7?",
                         "Write {x} in Roman numerals.", "Round {x} to hundreds.", "Factorise {x}."), ()),
        "near spelling": ("near", _on_items("spelling", "What does {x} mean?", "Use {x} in a sentence.",
                          "Translate {x} into French.", "Which words rhyme with {x}?", "Count the vowels of {x}."), ()),
        "near SQL": ("near", _on_items("SQL", "Explain what this returns: SELECT {b} FROM {t} WHERE {c} > {n};",
                     "Which index helps for {c} in table {t}?", "Write a Python loop over {t} that prints {c}.",
                     "What columns should a table of {t} have?", "Make a chart of {c} by {b} for our {t}."), ()),
    },
    "held out": {
        "Italian": ("far", filled("Raccontami qualcosa: {x}.", "Che ne pensi? Parlo di questo: {x}.", "Scrivi {m} righe su {x}.",
                    "Come posso migliorare {x}?", "Oggi penso a {x}.", "Perché {x} è importante?", "Non capisco {x}.",
                    "Aiutami con {x}!", x=_IT), ("romance",)),
        "Swedish": ("far", filled("Berätta om {x}.", "Vad tycker du om {x}?", "Skriv {m} rader om {x}.", "Jag tänker på {x}.",
                    "Hur blir {x} bättre?", "Varför är {x} viktigt?", "Hjälp mig med {x}!", "Jag förstår inte {x}.", x=_SV),
                    ("germanic",)),
        "Polish": ("far", filled("Opowiedz o {x}.", "Co myślisz o {x}?", "Napisz {m} zdań o {x}.", "Myślę dziś o {x}.",
                   "Porozmawiajmy o {x}.", "Dlaczego mówisz o {x}?", "Nie wiem nic o {x}.", x=_PL), ("other Latin script",)),
        "Japanese": ("far", filled("{x}について教えてください。", "{x}は好きですか。", "{x}の話を書いて。", "{x}について{m}語で説明して。",
                     "今日は{x}のことを考えています。", "{x}はなぜ大切ですか。", "{x}がわかりません。", x=_JA), ("Chinese, Japanese, Korean",)),
        "Arabic": ("far", filled("حدثني عن {x}.", "ما رأيك في {x}؟", "اكتب قصة عن {x}.", "لماذا {x} مهم؟", "أفكر اليوم في {x}.",
                   "أعطني {m} نصائح عن {x}.", "لا أفهم {x}.", x=_AR), ("Arabic, Hebrew, Devanagari",)),
        "programming help": ("far", filled("My {y} program about {x} leaks memory.", "Which {y} library would you use for {x}?",
                             "Can {y} call C code?", "How are exceptions handled in {y}, with {m} threads?",
                             "Port this {x} script from bash to {y}.", "Why does {y} say 'unexpected token' in line {m}?",
                             x=_THINGS, y=_LANGS), ("questions about code", "code")),
        "shell and code": ("far", filled("ls -la /{x} | grep {y} | head -n {m}", "#define {x} {n}\nstatic int {y} = {x};",
                           "while {x} < {n} do\n  {x} = {x} + 1\nend", "kubectl get pods -n {x} --limit={m}",
                           "val {x} = listOf({m}, {n}).map {{ it * 2 }}", "(defun {x} (n) (+ n {m}))", x=_THINGS, y=_THINGS),
                           ("code", "questions about code")),
        "recipes": ("far", sampled(_RECIPES, 2, 5), ("news", "encyclopedic", "narrative")),
        "contracts": ("far", sampled(_LEGAL, 2, 4), ("news", "encyclopedic", "narrative")),
        "science": ("far", sampled(_SCIENCE, 2, 4), ("news", "encyclopedic", "narrative")),
        "settings and headers": ("far", filled("[{x}]\n{y} = {n}\nenabled = true", "Content-Type: text/{x}\nX-{y}: {n}",
                                 "{x}: &{y}\n  size: {m}\n  max: {n}", "export {x}={n}", "GET /{x}/{y}/{n} HTTP/1.1\nHost: {y}",
                                 "{x}\t{n}\t{m}\n{y}\t{m}\t{n}", "<svg width='{n}'><{x} r='{m}'/></svg>", x=_THINGS, y=_THINGS),
                                 ("data and markup", "logs and addresses")),
        "hashes": ("far", characters(string.hexdigits.lower(), 16, 64),
                   ("random characters", "unknown words", "key mashing", "random tokens")),
        "symbols": ("far", characters("+-*/=<>[]{}()|~^_;:,.!? ", 5, 40),
                    ("random characters", "unknown words", "key mashing", "random tokens")),
        "repeated sentences": ("far", lambda rng: (rng.choice(_TALK) + " ") * rng.randint(3, 8), ("repetitions",)),
        "repeated tokens": ("far", lambda rng: rng.choice([*_COUNTRIES, "bla", "zz", "5", "##"]) * rng.randint(4, 25),
                            ("repetitions",)),
        "animals": ("far", filled("What do {x} eat?", "How long do {x} live?", "Where do {x} sleep?", "Are {x} dangerous?",
                    x=("lions", "geese", "crabs", "moths", "deer", "seals", "goats", "bats", "toads", "eels", "mice", "owls",
                       "pigs", "lynxes", "ants", "hares")), ("questions",)),
        "travel": ("far", filled("Plan {m} days in {x}.", "What should I eat in {x}?", "Is {x} safe for families?",
                   "When is the best time to visit {x}?", "Write a postcard from {x}.", x=_COUNTRIES),
                   ("questions", "writing requests")),
        "chatting": ("far", filled("{x} told me about {y} and I laughed.", "I spent {m} minutes on {y} today, with {x}.",
                     "Guess who likes {y}? {x}!", "Honestly, {y} bores me.", "Hi, me again. {x} says hello.",
                     x=_NAMES, y=_THINGS), ("small talk",)),
        "other short words": ("far", lambda rng: rng.choice(_SHORT_HELD_OUT), ("very short",)),
        "editing": ("far", filled("Turn this into a haiku: {x}", "Is this ironic? {x}", "{x} What is the subject of the sentence?",
                    "Give me a more formal version of: {x}", "{x}\nAnswer this message.", "Expand to {m} words: {x}",
                    "How does the author feel? {x}", "In the style of a pirate: {x}", x=_SENTENCES), ("requests about a text",)),
        "near numbers, other": ("near", _on_items("numbers", "Write {x} in binary.", "How many digits has {x}?",
                                "What is {x} percent of {n}?", "Is {x} bigger than {n}?", "Convert {x} metres to feet.",
                                "Who was born in the year {x}?"), ()),
        "near spelling, other": ("near", _on_items("spelling", "Define {x}.", "Is {x} a noun?", "Write a poem about {x}.",
                                 "Write {x} backwards.", "Which language does {x} come from?", "Give me synonyms of {x}."), ()),
        "near SQL, other": ("near", _on_items("SQL", "Which {t} should we delete first to save money?",
                            "Write a pandas expression for the mean {c} of {t}.", "What is a foreign key between {t} and {u}?",
                            "Give me an Excel formula that sums {c} per {b}.", "Draw an entity diagram for {t} and {u}.",
                            "Why is the {c} of our {t} so low in this {b}?"), ()),
    },
    "fresh": {
        "Danish": ("far", filled("Fortæl mig om {x}.", "Hvad synes du om {x}?", "Skriv {m} linjer om {x}.", "Jeg forstår ikke {x}.",
                   "Hvorfor er {x} vigtigt?", "I dag tænker jeg på {x}.", x=_DA), ("germanic", "nordic and baltic", "requests in German",
                   "requests in Dutch")),
        "Romanian": ("far", filled("Povestește-mi despre {x}.", "Ce crezi despre {x}?", "Scrie {m} rânduri despre {x}.",
                     "Nu înțeleg {x}.", "De ce este important {x}?", "Azi mă gândesc la {x}.", x=_RO), ("romance", "requests in French",
                     "requests in Spanish", "requests in Italian and Portuguese", "slavic in Latin script, Hungarian, Romanian")),
        "Ukrainian": ("far", filled("Розкажи про {x}.", "Що ти думаєш про {x}?", "Напиши {m} речень про {x}.", "Я не розумію {x}.",
                      "Сьогодні я думаю про {x}.", x=_UK), ("Cyrillic and Greek", "requests in Russian")),
        "Thai": ("far", filled("เล่าเรื่อง{x}ให้ฟังหน่อย", "คุณคิดอย่างไรเกี่ยวกับ{x}", "เขียน{m}ประโยคเกี่ยวกับ{x}", "ทำไม{x}ถึงสำคัญ", "ฉันไม่เข้าใจ{x}",
                 x=_TH), ("Arabic, Hebrew, Devanagari", "Chinese, Japanese, Korean")),
        "forum posts on code": ("far", filled("After upgrading {y} to version {m} my {x} tests hang forever.",
                                "Is there a {y} equivalent of Python's zip?", "How would you cache {x} in a {y} web app?",
                                "{y}: null pointer when parsing {x}", "Please explain generics in {y} to me.",
                                "What IDE do {y} people use in 20{m}?", x=_THINGS, y=_LANGS),
                                ("questions about code", "code", "programming help", "computers")),
        "markup and formulas": ("far", filled("\\section{{{x}}}\n\\frac{{{m}}}{{{n}}}", "# {x}\n\n* {y}\n* **{m}**", "@{x}({y}={n})",
                                "=SUM({x}!A{m}:B{n})", "<li class='{x}'>{y}</li>", "{x}_{y} := {m}; {y}++;", x=_THINGS, y=_THINGS),
                                ("code", "data and markup", "logs and addresses")),
        "insurance": ("far", sampled(_INSURANCE, 2, 4), ("news", "encyclopedic", "narrative", "legal and official",
                      "science and medicine")),
        "horoscopes": ("far", sampled(_HOROSCOPES, 2, 3), ("narrative", "everyday statements", "adverts and headlines", "quotes and verse")),
        "job adverts": ("far", sampled(_JOBS, 2, 4), ("adverts and headlines", "legal and official", "letters and e-mails")),
        "weather reports": ("far", sampled(_WEATHER, 2, 3), ("news", "narrative", "encyclopedic", "science and medicine")),
        "keys and codes": ("far", characters(string.ascii_uppercase + string.digits + "-_", 8, 40),
                           ("random characters", "unknown words", "key mashing", "random tokens")),
        "emoji": ("far", characters("😀😂🎉❤️👍🔥🙏😢🚀 ", 2, 12), ("random characters", "very short")),
        "refrains": ("far", lambda rng: " ".join([rng.choice(_TALK).rstrip(".!?")] * rng.randint(3, 9)), ("repetitions", "random words")),
        "gardening": ("far", filled("When do I plant {x}?", "My {x} have yellow leaves.", "How much sun do {x} need?",
                      "Can {x} grow in a pot of {m} litres?", "Are {x} poisonous for cats?",
                      x=("tomatoes", "roses", "tulips", "beans", "carrots", "ferns", "lilies", "peas", "onions", "figs", "herbs", "poppies")),
                      ("questions", "advice and opinions", "facts and people", "recipes and instructions")),
        "film talk": ("far", filled("Have you seen the one with {x}? I liked the {y}.", "That film bored me, {x} fell asleep.",
                      "We watched {m} episodes in a row.", "{x} recommended a series about {y}.", "Worst ending ever, even {x} said so.",
                      x=_NAMES, y=_THINGS), ("small talk", "everyday statements")),
        "replies": ("far", lambda rng: rng.choice(_REPLIES), ("very short", "small talk")),
        "work on texts": ("far", filled("Who is speaking here? {x}", "Make this sound sarcastic: {x}", "Turn this into a dialogue: {x}",
                          "{x} What could happen before that?", "Write {m} hashtags for: {x}", "Underline the verb: {x}",
                          "Answer as a poet: {x}", x=_SENTENCES), ("requests about a text", "text work")),
        "near numbers, fresh": ("near", _on_items("numbers", "Tell a story about the number {x}.", "Is {x} a square number?",
                                "Write {x} in scientific notation.", "Subtract {n} from {x}.", "What is the last digit of {x}?",
                                "Convert {x} seconds to hours."), ()),
        "near spelling, fresh": ("near", _on_items("spelling", "Make a crossword clue for {x}.", "How many syllables has {x}?",
                                 "Name a product called {x}.", "What is the past tense of {x}?", "Write {x} in capital letters.",
                                 "Is {x} a formal word?"), ()),
        "near SQL, fresh": ("near", _on_items("SQL", "Write an e-mail to the team about the {c} of our {t}.",
                            "Design a web page that lists {t} by {c}.", "Explain to a manager why {c} of {t} dropped.",
                            "Write an R script that plots {c} against {b}.", "How should we back up the table {t}?",
                            "Should {t} be stored as CSV or JSON?"), ()),
    },
    "later": {
        "Czech": ("far", filled("Řekni mi něco o {x}.", "Co si myslíš o {x}?", "Napiš {m} řádků o {x}.", "Dnes přemýšlím o {x}.",
                  x=_CS), ("other Latin script", "slavic in Latin script, Hungarian, Romanian", "requests in Polish and Czech")),
        "Indonesian": ("far", filled("Ceritakan tentang {x}.", "Apa pendapatmu tentang {x}?", "Tulis {m} kalimat tentang {x}.",
                       "Saya tidak mengerti {x}.", "Mengapa {x} penting?", x=_ID),
                       ("other Latin script", "languages of Africa and Asia in Latin script")),
        "Greek": ("far", filled("Πες μου για {x}.", "Τι πιστεύεις για {x};", "Γράψε {m} γραμμές για {x}.", "Σήμερα σκέφτομαι {x}.",
                  x=_EL), ("Cyrillic and Greek", "requests in Russian")),
        "Bengali": ("far", filled("{x} সম্পর্কে বলো।", "{x} কেন গুরুত্বপূর্ণ?", "{x} নিয়ে {m}টি বাক্য লেখো।", "আমি {x} বুঝি না।", x=_BN),
                    ("Arabic, Hebrew, Devanagari",)),
        "build and deployment": ("far", filled("FROM {x}:{m}\nRUN make {y}\nEXPOSE {n}", "mov eax, {m}\nadd eax, {n}\nret",
                                 "git commit -m 'fix {x}' && git push", "@media ({x}: {n}px) {{ .{y} {{ margin: {m}px }} }}",
                                 "resource {x} {y} {{ count = {m} }}", x=_THINGS, y=_THINGS),
                                 ("code", "data and markup", "logs and addresses")),
        "computer trouble": ("far", filled("My {y} project about {x} does not compile any more.", "Why is {y} so slow at startup?",
                             "Which book on {y} do you recommend?", "Can I use {y} to scrape pages on {x}?",
                             "{y} or {z} for a beginner?", "Segmentation fault in {y} after {m} seconds", x=_THINGS, y=_LANGS, z=_LANGS),
                             ("questions about code", "code", "programming help", "computers")),
        "museum labels": ("far", sampled(_MUSEUM, 2, 4), ("news", "encyclopedic", "narrative", "science and medicine")),
        "camping": ("far", sampled(_CAMPING, 2, 4), ("recipes and instructions", "narrative", "advice and opinions")),
        "voice commands": ("far", lambda rng: rng.choice(_DEVICE), ("very short", "small talk", "everyday statements")),
        "account numbers": ("far", characters(string.digits + "  -", 10, 34),
                            ("random characters", "unknown words", "key mashing", "random tokens")),
        "brackets": ("far", lambda rng: rng.choice(("()", "[]{}", "<>", "/\\", "=-")) * rng.randint(4, 25), ("repetitions",)),
        "health questions": ("far", filled("Is {x} good for my back?", "Can {x} cause headaches?", "My doctor forbids {x}. Why?",
                             "How much {x} is healthy at {m}?", x=("tea", "running", "cheese", "coffee", "sleep", "rice", "chess",
                             "swimming", "sugar", "salt", "wine", "yoga")),
                             ("questions", "advice and opinions", "science and medicine", "facts and people")),
        "plans": ("far", filled("{x} and I are going to talk about {y} on Friday.", "I gave {y} up, ask {x}.", "Guess what, {x} sold {m} {y}!",
                  "Do you remember {x}? The one with {y}.", x=_NAMES, y=_THINGS), ("small talk", "everyday statements")),
        "on sentences": ("far", filled("Is this a threat? {x}", "{x} Say that in {m} words.", "Read between the lines: {x}",
                         "Add an emoji to this: {x}", "Put it as a tweet: {x}", "What language is this? {x}", x=_SENTENCES),
                         ("requests about a text", "text work")),
        "near numbers, later": ("near", _on_items("numbers", "What is {x} minus {n}?", "Is {x} a Fibonacci number?", "Write {x} backwards.",
                                "How many bits does {x} need?", "Convert {x} grams to pounds.", "What happened in {x}?"), ()),
        "near spelling, later": ("near", _on_items("spelling", "Explain {x} to a child.", "Where is the stress in {x}?", "Rhymes for {x}?",
                                 "Write a sentence with {x}.", "How often does e occur in {x}?", "What is {x} in German?"), ()),
        "near SQL, later": ("near", _on_items("SQL", "Which {c} is usual for {t}?", "Write a Java class for {t} with {c} and {b}.",
                            "Draft a report on {c} of our {t}.", "What is the privacy risk of storing {c} of {t}?",
                            "Suggest test data for {t} with {c}.", "Sketch a dashboard of {b} per {c}."), ()),
    },
}  # fmt: skip
