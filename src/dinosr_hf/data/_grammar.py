"""
A small grammar per language for the texts of the synthetic corpus, written for this package.

Each rule lists its alternatives, separated by |; `{name}` in an alternative stands for one alternative of the rule
`name`. Two rules are used from outside, "sentence" and "digit". The words are native ones (a foreign word makes
espeak-ng switch language within the sentence), without apostrophes and hyphens, so that words are separated by spaces
alone, and chosen so that the articles in front of them fit and that espeak-ng runs no two of them together (as "in
the"). Everything is lower case; punctuation makes pauses.
"""

import re

import numpy as np

Grammar = dict[str, tuple[str, ...]]


def _parse(text: str) -> Grammar:
    """Parse lines `rule: alternative | alternative | ...`; a line that begins with | continues the previous one."""
    rules = (line.split(": ", 1) for line in text.strip().replace("\n|", " |").splitlines())
    return {name: tuple(alternatives.split(" | ")) for name, alternatives in rules}


GRAMMARS: dict[str, Grammar] = {
    "en": _parse("""
sentence: {who} {does} {what} {where}. | {who} {does} {what}, and {who} {goes} {where}. | {when}, {who} {does} {what}.
| please {order} {what} {where}. | we saw {digit} {things} {where}. | {who} {goes} {where} {when}.
| why did {who} {order} {what}? | {who} {is} {quality} and {quality}.
digit: zero | one | two | three | four | five | six | seven | eight | nine
who: the {quality} {animal} | my {person} | your {quality} {person} | every {person} | she | he
animal: dog | fox | horse | mouse | goose | sheep | cat | zebra | giraffe | bird | lion | whale
person: brother | father | mother | teacher | judge | doctor | singer | cousin | nurse | boy
quality: small | quiet | young | brave | thin | huge | yellow | bright | purple | strange | rich
does: sees | takes | wants | loves | paints | moves | found | bought | washed | chose | threw
goes: runs | sleeps | waits | laughs | stood | went | works | dreams
order: take | bring | watch | measure | choose | push | fetch | hide | show | keep
is: is | was | looks | seems
what: the {quality} {thing} | a {thing} | this {thing} | another {thing} | both {things} | some {things}
thing: book | chair | cup | ship | garden | shirt | treasure | coin | stone | cloth | vase | fire
things: books | boxes | leaves | windows | flowers | oranges | bridges | keys | apples | feathers
where: inside the house | under the tree | near the beach | by the river | behind that church | over there
when: today | this morning | after work | once a year | on thursday | before noon | every evening
"""),
    "de": _parse("""
sentence: {who} {does} {what} {where}. | {when} {does} {who} {what}. | {who} {goes} {where}, und {who} {does} {what}.
| wir sehen {digit} {things} {where}. | warum {does} {who} {what}? | {who} ist {quality} und {quality}.
| {when} {goes} {who} {where}.
digit: null | eins | zwei | drei | vier | fünf | sechs | sieben | acht | neun
who: der {man} | die {woman} | mein {man} | deine {woman} | jeder {man} | unsere {woman} | das kind
man: bruder | vater | lehrer | junge | fuchs | hund | vogel | könig | bauer | arzt
woman: schwester | mutter | köchin | katze | maus | tante | richterin | ziege | freundin
quality: klein | schön | müde | jung | reich | süß | groß | fleißig | höflich | traurig | neu
does: sieht | kauft | sucht | findet | malt | öffnet | bringt | wäscht | zeigt | versteckt
goes: schläft | wartet | lacht | steht | arbeitet | träumt | singt | läuft
what: den {object} | einen {object} | das {item} | ein {item} | diese {things} | keine {things}
object: stuhl | schlüssel | apfel | brief | löffel | mantel | ring | teppich | topf | schatz
item: buch | haus | schiff | feuer | brot | glas | fenster | hemd | bild | geschenk
things: bücher | blumen | äpfel | kirschen | zeitungen | vögel | brücken | jacken | steine
where: im garten | unter dem baum | in der küche | am fluss | hinter der kirche | auf dem dach | dort
when: heute | am morgen | jede woche | nach der arbeit | im frühling | manchmal | übermorgen
"""),
    "es": _parse("""
sentence: {who} {does} {what} {where}. | {when}, {who} {does} {what}. | {who} {goes} {where}, y {who} {does} {what}.
| hay {digit} {things} {where}. | ¿por qué {does} {who} {what}? | {who} siempre {goes} {where}.
digit: cero | uno | dos | tres | cuatro | cinco | seis | siete | ocho | nueve
who: el {man} | la {woman} | mi {man} | tu {woman} | este {man} {tall} | ella | un {man}
man: hermano | padre | maestro | niño | zorro | perro | pájaro | rey | caballo | juez
woman: hermana | madre | cocinera | gata | reina | oveja | vecina | jirafa | muchacha
tall: alto | joven | pequeño | rojo | triste | feliz | viejo | tranquilo
does: mira | compra | busca | encuentra | pinta | abre | trae | lleva | guarda | quiere
goes: duerme | espera | trabaja | corre | canta | sueña | llora | juega
what: el {object} | un {object} {tall} | la {item} | una {item} | estas {things} | muchas {things}
object: libro | zapato | anillo | queso | cuchillo | jardín | barco | fuego | reloj | dibujo
item: silla | llave | casa | manzana | carta | piedra | camisa | ventana | taza | bolsa
things: flores | cajas | hojas | llaves | naranjas | cerezas | puertas | sillas
where: en la cocina | bajo el árbol | cerca del río | en el jardín | detrás de la iglesia | allí
when: hoy | por la mañana | cada año | a veces | mañana por la noche | los jueves | en junio
"""),
    "fr": _parse("""
sentence: {who} {does} {what} {where}. | {when}, {who} {does} {what}. | {who} {goes} {where}, et {who} {does} {what}.
| il y a {digit} {things} {where}. | pourquoi {who} {goes} {where}? | {who} {goes} toujours {where}.
digit: zéro | un | deux | trois | quatre | cinq | six | sept | huit | neuf
who: le {man} | la {woman} | mon {man} | ta {woman} | ce {man} {tall} | chaque {woman} | elle
man: frère | père | juge | garçon | renard | chien | loup | roi | cheval | voisin
woman: soeur | mère | fille | vache | reine | chèvre | voisine | girafe | chanteuse
tall: calme | jeune | rouge | triste | brun | bizarre | heureux | célèbre
does: regarde | cherche | trouve | dessine | montre | garde | mange | veut | choisit | prend
goes: dort | chante | travaille | joue | rêve | reste | pleure | court
what: le {object} | un {object} {tall} | la {item} | une {item} | des {things} | deux {things}
object: livre | gâteau | couteau | jardin | bateau | feu | pain | chapeau | bouquet | train
item: chaise | maison | pomme | lettre | pierre | chemise | table | montagne | feuille | cuillère
things: fleurs | boîtes | clés | cerises | portes | voitures | poires | photos | jambes
where: dans la cuisine | sous le pont | près du fleuve | dans le jardin | derrière la gare | ici
when: demain | le matin | chaque jour | parfois | le jeudi | pendant la nuit | en juin
"""),
    "it": _parse("""
sentence: {who} {does} {what} {where}. | {when}, {who} {does} {what}. | {who} {goes} {where}, e {who} {does} {what}.
| ci sono {digit} {things} {where}. | perché {who} {does} {what}? | {who} {goes} sempre {where}.
digit: zero | uno | due | tre | quattro | cinque | sei | sette | otto | nove
who: il {man} | la {woman} | mio {man} | questa {woman} | un {man} {tall} | ogni {woman} | lei
man: fratello | padre | maestro | ragazzo | lupo | cane | gatto | re | cavallo | giudice
woman: sorella | madre | cuoca | volpe | regina | pecora | vicina | giraffa | figlia
tall: alto | giovane | piccolo | rosso | triste | felice | vecchio | tranquillo
does: guarda | compra | cerca | trova | disegna | apre | porta | lava | sceglie | vuole
goes: dorme | aspetta | lavora | corre | canta | sogna | piange | gioca
what: il {object} | un {object} {tall} | la {item} | una {item} | queste {things} | molte {things}
object: libro | cappello | formaggio | coltello | giardino | fuoco | pane | quadro | biglietto
item: sedia | chiave | casa | mela | lettera | pietra | camicia | finestra | tazza | foglia
things: scatole | foglie | ciliegie | porte | scarpe | rose | bottiglie | pesche
where: in cucina | sotto il ponte | vicino al fiume | nel giardino | dietro la chiesa | qui
when: oggi | di mattina | ogni giorno | a volte | domani sera | a giugno | dopo pranzo
"""),
}


def expand(grammar: Grammar, rule: str, generator: np.random.Generator) -> str:
    """Return a random text of a rule; each alternative is equally likely."""
    alternative = grammar[rule][generator.integers(len(grammar[rule]))]
    return re.sub(r"\{(\w+)\}", lambda match: expand(grammar, match[1], generator), alternative)


def digit_string(grammar: Grammar, generator: np.random.Generator) -> str:
    """Return three to eight random digits, with a comma (a short pause) after each group of two to four."""
    remaining, groups = int(generator.integers(3, 9)), []
    while remaining > 0:
        size = min(remaining, int(generator.integers(2, 5)))
        groups.append(" ".join(expand(grammar, "digit", generator) for _ in range(size)))
        remaining -= size
    return ", ".join(groups) + "."
