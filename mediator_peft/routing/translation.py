"""Calibration texts word by word in other languages: what asks for the task is translated, what it is about stays.

"Correct the spelling of this word: recieve" becomes "Corrige la ortografía de esta palabra: recieve". No grammar is
tried, and none is needed: copies in a few languages show the router which directions a language changes, and requests
in languages that the table does not have are recognised better as well. Our choice, measured in ``docs/routing.md``.
"""

from __future__ import annotations

from .augmentation import bare_word

LANGUAGES_OF_TABLE = ("German", "French", "Spanish", "Italian", "Portuguese", "Dutch", "Polish", "Russian")
LEAST_TRANSLATED = 0.5
"""Share of the words of a task that must be in the table; other texts have no translated copy."""

# English|German|French|Spanish|Italian|Portuguese|Dutch|Polish|Russian. An empty entry leaves the word out.
_TABLE = """
a|ein|un|un|un|um|een||
about|über|sur|sobre|su|sobre|over|o|о
add|addiere|additionne|suma|somma|soma|tel op|dodaj|сложи
all|alle|tous|todos|tutti|todos|alle|wszystkie|все
an|ein|un|un|un|um|een||
and|und|et|y|e|e|en|i|и
answer|antworte|réponds|responde|rispondi|responde|antwoord|odpowiedz|ответь
antonym|gegenteil|antonyme|antónimo|contrario|antónimo|tegendeel|antonim|антоним
are|sind|sont|son|sono|são|zijn|są|
article|artikel|article|artículo|articolo|artigo|artikel|artykuł|статью
below|unten|ci-dessous|abajo|sotto|abaixo|hieronder|poniżej|ниже
can|kann|peut|puede|può|pode|kan|może|может
category|kategorie|catégorie|categoría|categoria|categoria|categorie|kategoria|категория
change|ändere|change|cambia|cambia|muda|verander|zmień|измени
check|prüfe|vérifie|comprueba|controlla|verifica|controleer|sprawdź|проверь
choose|wähle|choisis|elige|scegli|escolhe|kies|wybierz|выбери
city|stadt|ville|ciudad|città|cidade|stad|miasto|город
classify|ordne ein|classe|clasifica|classifica|classifica|classificeer|sklasyfikuj|классифицируй
code|code|code|código|codice|código|code|kod|код
command|befehl|commande|comando|comando|comando|opdracht|polecenie|команда
complete|vervollständige|complète|completa|completa|completa|voltooi|uzupełnij|дополни
compute|berechne|calcule|calcula|calcola|calcula|bereken|oblicz|вычисли
calculate|berechne|calcule|calcula|calcola|calcula|bereken|oblicz|вычисли
convert|wandle um|convertis|convierte|converti|converte|zet om|zamień|преобразуй
correct|korrigiere|corrige|corrige|correggi|corrige|verbeter|popraw|исправь
count|zähle|compte|cuenta|conta|conta|tel|policz|посчитай
country|land|pays|país|paese|país|land|kraj|страна
create|erstelle|crée|crea|crea|cria|maak|stwórz|создай
currency|währung|monnaie|moneda|valuta|moeda|munt|waluta|валюта
date|datum|date|fecha|data|data|datum|data|дату
define|definiere|définis|define|definisci|define|definieer|zdefiniuj|определи
definition|definition|définition|definición|definizione|definição|definitie|definicja|определение
describe|beschreibe|décris|describe|descrivi|descreve|beschrijf|opisz|опиши
digits|ziffern|chiffres|dígitos|cifre|dígitos|cijfers|cyfry|цифры
do|tun|faire|hacer|fare|fazer|doen|zrobić|делать
does|tut|fait|hace|fa|faz|doet|robi|делает
email|e-mail|courriel|correo|e-mail|e-mail|e-mail|e-mail|письмо
english|englisch|anglais|inglés|inglese|inglês|engels|angielski|английский
equation|gleichung|équation|ecuación|equazione|equação|vergelijking|równanie|уравнение
error|fehler|erreur|error|errore|erro|fout|błąd|ошибку
evaluate|werte aus|évalue|evalúa|valuta|avalia|evalueer|oceń|оцени
example|beispiel|exemple|ejemplo|esempio|exemplo|voorbeeld|przykład|пример
explain|erkläre|explique|explica|spiega|explica|leg uit|wyjaśnij|объясни
expression|ausdruck|expression|expresión|espressione|expressão|uitdrukking|wyrażenie|выражение
extract|entnimm|extrais|extrae|estrai|extrai|haal uit|wyodrębnij|извлеки
feeling|gefühl|sentiment|sentimiento|sentimento|sentimento|gevoel|uczucie|чувство
find|finde|trouve|encuentra|trova|encontra|vind|znajdź|найди
fix|behebe|répare|arregla|sistema|conserta|herstel|napraw|исправь
following|folgende|suivant|siguiente|seguente|seguinte|volgende|następujący|следующее
for|für|pour|para|per|para|voor|dla|для
form|form|forme|forma|forma|forma|vorm|forma|форму
format|format|format|formato|formato|formato|formaat|format|формат
formula|formel|formule|fórmula|formula|fórmula|formule|wzór|формулу
from|von|de|de|da|de|van|z|из
generate|erzeuge|génère|genera|genera|gera|genereer|wygeneruj|сгенерируй
give|gib|donne|da|dai|dá|geef|podaj|дай
grammar|grammatik|grammaire|gramática|grammatica|gramática|grammatica|gramatykę|грамматику
how|wie|comment|cómo|come|como|hoe|jak|как
i|ich|je|yo|io|eu|ik|ja|я
in|in|en|en|in|em|in|w|в
into|in|en|en|in|em|in|na|в
is|ist|est|es|è|é|is|jest|
it|es|le|lo|lo|o|het|to|это
kind|art|sorte|tipo|tipo|tipo|soort|rodzaj|вид
language|sprache|langue|idioma|lingua|língua|taal|język|язык
letters|buchstaben|lettres|letras|lettere|letras|letters|litery|буквы
list|liste|liste|lista|elenco|lista|lijst|listę|список
made|gemacht|fait|hecho|fatto|feito|gemaakt|zrobiony|сделано
make|mache|fais|haz|fai|faz|maak|zrób|сделай
many|viele|combien|muchos|molti|muitos|veel|wiele|много
me|mir|moi|me|mi|me|mij|mi|мне
mean|bedeutet|signifie|significa|significa|significa|betekent|znaczy|значит
meaning|bedeutung|sens|significado|significato|significado|betekenis|znaczenie|значение
message|nachricht|message|mensaje|messaggio|mensagem|bericht|wiadomość|сообщение
metric|metrische|métriques|métricas|metriche|métricas|metrische|metryczne|метрические
mistake|fehler|faute|error|errore|erro|fout|błąd|ошибку
much|viel|beaucoup|mucho|molto|muito|veel|dużo|много
my|mein|mon|mi|mio|meu|mijn|mój|мой
name|nenne|nomme|nombra|nomina|nomeia|noem|nazwij|назови
negative|negativ|négatif|negativo|negativo|negativo|negatief|negatywne|отрицательный
next|nächste|suivant|próximo|prossimo|próximo|volgende|następny|следующий
number|zahl|nombre|número|numero|número|getal|liczbę|число
of|von|de|de|di|de|van|z|
old|alt|vieux|viejo|vecchio|velho|oud|stary|старый
on|auf|sur|en|su|em|op|na|на
one|eins|un|uno|uno|um|een|jeden|один
opposite|gegenteil|contraire|opuesto|contrario|contrário|tegendeel|przeciwieństwo|противоположность
or|oder|ou|o|o|ou|of|czy|или
past|vergangenheit|passé|pasado|passato|passado|verleden|przeszły|прошедшее
plural|plural|pluriel|plural|plurale|plural|meervoud|mnoga|множественное
please|bitte|s'il te plaît|por favor|per favore|por favor|alsjeblieft|proszę|пожалуйста
poem|gedicht|poème|poema|poesia|poema|gedicht|wiersz|стихотворение
positive|positiv|positif|positivo|positivo|positivo|positief|pozytywne|положительный
problem|aufgabe|problème|problema|problema|problema|probleem|zadanie|задачу
put|setze|mets|pon|metti|põe|zet|wstaw|поставь
query|abfrage|requête|consulta|interrogazione|consulta|query|zapytanie|запрос
question|frage|question|pregunta|domanda|pergunta|vraag|pytanie|вопрос
read|lies|lis|lee|leggi|lê|lees|przeczytaj|прочитай
replace|ersetze|remplace|reemplaza|sostituisci|substitui|vervang|zastąp|замени
result|ergebnis|résultat|resultado|risultato|resultado|resultaat|wynik|результат
return|gib zurück|renvoie|devuelve|restituisci|devolve|geef terug|zwróć|верни
review|bewertung|avis|reseña|recensione|avaliação|recensie|opinia|отзыв
rewrite|schreibe um|réécris|reescribe|riscrivi|reescreve|herschrijf|przepisz|перепиши
rhyme|reim|rime|rima|rima|rima|rijm|rym|рифму
right|richtig|juste|correcto|giusto|certo|goed|dobrze|правильно
say|sage|dis|di|di'|diz|zeg|powiedz|скажи
schedule|zeitplan|horaire|horario|orario|horário|schema|harmonogram|расписание
sentence|satz|phrase|frase|frase|frase|zin|zdanie|предложение
sentiment|stimmung|sentiment|sentimiento|sentimento|sentimento|stemming|nastrój|настроение
short|kurz|court|corto|breve|curto|kort|krótko|кратко
show|zeige|montre|muestra|mostra|mostra|toon|pokaż|покажи
solve|löse|résous|resuelve|risolvi|resolve|los op|rozwiąż|реши
sort|sortiere|trie|ordena|ordina|ordena|sorteer|posortuj|отсортируй
spell|buchstabiere|épelle|deletrea|sillaba|soletra|spel|przeliteruj|напиши
spelling|rechtschreibung|orthographe|ortografía|ortografia|ortografia|spelling|pisownię|орфографию
story|geschichte|histoire|historia|storia|história|verhaal|historię|рассказ
sum|summe|somme|suma|somma|soma|som|suma|сумму
summarise|fasse zusammen|résume|resume|riassumi|resume|vat samen|streść|резюмируй
summarize|fasse zusammen|résume|resume|riassumi|resume|vat samen|streść|резюмируй
summary|zusammenfassung|résumé|resumen|riassunto|resumo|samenvatting|streszczenie|резюме
synonym|synonym|synonyme|sinónimo|sinonimo|sinónimo|synoniem|synonim|синоним
table|tabelle|table|tabla|tabella|tabela|tabel|tabela|таблицу
tell|sage|dis|di|di'|diz|vertel|powiedz|скажи
tense|zeitform|temps|tiempo|tempo|tempo|tijd|czas|время
text|text|texte|texto|testo|texto|tekst|tekst|текст
that|das|que|que|che|que|dat|to|что
the|die|la|la|la|a|de||
these|diese|ces|estos|questi|estes|deze|te|эти
thing|ding|chose|cosa|cosa|coisa|ding|rzecz|вещь
this|dieses|ce|esta|questa|esta|dit|to|это
time|zeit|heure|hora|ora|hora|tijd|czas|время
title|titel|titre|título|titolo|título|titel|tytuł|заголовок
to|zu|à|a|a|para|naar|do|в
translate|übersetze|traduis|traduce|traduci|traduz|vertaal|przetłumacz|переведи
turn|mache|transforme|convierte|trasforma|transforma|maak|zmień|преврати
type|typ|type|tipo|tipo|tipo|type|typ|тип
unit|einheit|unité|unidad|unità|unidade|eenheid|jednostka|единица
units|einheiten|unités|unidades|unità|unidades|eenheden|jednostki|единицы
use|benutze|utilise|usa|usa|usa|gebruik|użyj|используй
used|benutzt|utilisé|usado|usato|usado|gebruikt|używany|используется
using|mit|avec|usando|usando|usando|met|używając|используя
verb|verb|verbe|verbo|verbo|verbo|werkwoord|czasownik|глагол
what|was|que|qué|che|que|wat|co|что
when|wann|quand|cuándo|quando|quando|wanneer|kiedy|когда
where|wo|où|dónde|dove|onde|waar|gdzie|где
which|welche|quelle|qué|quale|qual|welke|jaki|какой
who|wer|qui|quién|chi|quem|wie|kto|кто
why|warum|pourquoi|por qué|perché|por que|waarom|dlaczego|почему
with|mit|avec|con|con|com|met|z|с
word|wort|mot|palabra|parola|palavra|woord|słowo|слово
words|worten|mots|palabras|parole|palavras|woorden|słowami|словами
write|schreibe|écris|escribe|scrivi|escreve|schrijf|napisz|напиши
wrong|falsch|faux|incorrecto|sbagliato|errado|fout|źle|неправильно
year|jahr|année|año|anno|ano|jaar|rok|год
you|du|tu|tú|tu|tu|jij|ty|ты
your|dein|ton|tu|tuo|teu|jouw|twój|твой
"""


def _table() -> dict[str, tuple[str, ...]]:
    rows = (line.split("|") for line in _TABLE.strip().splitlines())
    return {english: tuple(others) for english, *others in rows}


_WORDS = _table()


def in_other_words(text: str, shared: frozenset[str], language: int) -> str | None:
    """The text with the words by which its task is asked for in another language, in the order in which they stand.

    Args:
        text: as a user wrote it, in English.
        shared: words of :func:`~mediator_peft.routing.augmentation.shared_words`.
        language: place in ``LANGUAGES_OF_TABLE``.

    Returns:
        None where fewer than half of these words are in the table.
    """
    words: list[str] = []
    num_shared = num_found = 0
    for word in text.split():
        bare = bare_word(word)
        if bare not in shared or not bare.isalpha():
            words.append(word)
            continue
        num_shared += 1
        found = _WORDS.get(bare)
        num_found += found is not None
        new = word if found is None else _put_into(word, bare, found[language], is_first=not words)
        words += [new] if new else []
    return " ".join(words) if num_shared and num_found >= LEAST_TRANSLATED * num_shared else None


def _put_into(word: str, bare: str, new: str, is_first: bool) -> str:
    """A word with its punctuation, the letters replaced; a capital letter stays one at the start of the text."""
    start = word.lower().find(bare)
    if not new:
        return ""
    letters = new[:1].upper() + new[1:] if is_first and word[start : start + 1].isupper() else new
    return word[:start] + letters + word[start + len(bare) :]
