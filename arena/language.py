"""How people talk on the simulated platform: a small grammar engine and the benign tongue.

Belongs here: the engine, benign vocabulary and templates, and the noise of typing. What abusers say belongs to
`arena.attackers`; who speaks to whom, and when, to `arena.platform`. Everything was written for this project.

A template is a line of text with `{slot}` (any rule of the grammar) and `[a|b|]` (a choice made on the spot,
which may nest and hold slots). A rule is a list of templates, or a function of the random generator.
"""

# ruff: noqa: E501  (templates and vocabularies stand one entry a line)

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from random import Random

Node = str | tuple[str, object]
Rule = Sequence[str] | Callable[[Random], str]


def words(text: str) -> list[str]:
    """Split a vocabulary written with bars and line breaks into its entries."""
    return [entry.strip() for line in text.strip().splitlines() for entry in line.split("|") if entry.strip()]


def lines(text: str) -> list[str]:
    """Split templates written one a line (bars inside a line stay: they are choices)."""
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


class Grammar:
    """Templates compiled once, expanded many times; the same generator state gives the same text.

    A missing slot raises `KeyError` naming it when the grammar is built, never while it talks.
    """

    def __init__(self, rules: Mapping[str, Rule], *parents: Grammar) -> None:
        self._makers: dict[str, Callable[[Random], str]] = {}
        self._options: dict[str, list[list[Node]]] = {}
        for parent in parents:
            self._makers.update(parent._makers)
            self._options.update(parent._options)
        for name, rule in rules.items():
            if callable(rule):
                self._makers[name] = rule
                self._options.pop(name, None)
            else:
                self._options[name] = [_compile(option) for option in rule]
                self._makers.pop(name, None)
        for name in rules:
            for option in self._options.get(name, ()):
                self._check(name, option)

    def say(self, rng: Random, rule: str) -> str:
        """One expansion of `rule`, with the spaces that empty choices leave behind closed."""
        out: list[str] = []
        self._expand(rng, rule, out)
        return re.sub(r" {2,}", " ", "".join(out)).replace(" ,", ",").strip()

    def __contains__(self, rule: str) -> bool:
        return rule in self._options or rule in self._makers

    def _expand(self, rng: Random, rule: str, out: list[str]) -> None:
        maker = self._makers.get(rule)
        if maker is not None:
            out.append(maker(rng))
            return
        options = self._options[rule]
        self._emit(rng, options[int(rng.random() * len(options))], out)

    def _emit(self, rng: Random, nodes: list[Node], out: list[str]) -> None:
        for node in nodes:
            if isinstance(node, str):
                out.append(node)
            elif node[0] == "slot":
                self._expand(rng, str(node[1]), out)
            else:
                choices: list[list[Node]] = node[1]  # type: ignore[assignment]
                self._emit(rng, choices[int(rng.random() * len(choices))], out)

    def _check(self, rule: str, nodes: list[Node]) -> None:
        for node in nodes:
            if isinstance(node, str):
                continue
            if node[0] == "slot":
                if str(node[1]) not in self:
                    raise KeyError(f"rule {rule!r} uses the slot {node[1]!r}, which no rule defines")
            else:
                for choice in node[1]:  # type: ignore[attr-defined]
                    self._check(rule, choice)


def _compile(template: str) -> list[Node]:
    nodes, end = _sequence(template, 0, closing="")
    if end != len(template):
        raise ValueError(f"template {template!r} closes a choice it never opened, at {end}")
    return nodes


def _sequence(template: str, at: int, closing: str) -> tuple[list[Node], int]:
    nodes: list[Node] = []
    text: list[str] = []

    def flush() -> None:
        if text:
            nodes.append("".join(text))
            text.clear()

    while at < len(template):
        char = template[at]
        if char in closing:
            break
        if char == "{":
            end = template.index("}", at)
            flush()
            nodes.append(("slot", template[at + 1 : end]))
            at = end + 1
        elif char == "[":
            choices: list[list[Node]] = []
            while template[at] != "]":
                choice, at = _sequence(template, at + 1, closing="|]")
                choices.append(choice)
            flush()
            nodes.append(("choice", choices))
            at += 1
        else:
            text.append(char)
            at += 1
    flush()
    return nodes, at


# --- vocabulary every speaker shares

NAMES = words("""
    alex|sam|mika|jules|noor|kai|lena|tomas|priya|yuki|dani|remy|ines|oskar|zara|felix|nadia|leo|maya|ivan|suki
    bram|hana|theo|lucia|omar|freya|nico|ada|pavel|rosa|milo|ying|carl|elif|jonas|tess|amir|wren|dario|bea|finn
    asha|hugo|vera|kofi|luna|matt|greta|ravi|chloe|abe|sofia|dmitri|june|pablo|iris|hassan|molly|quinn|erik|talia
""")
_HANDLES = words("""
    night|shadow|pixel|turbo|frost|ghost|lunar|toast|noodle|panda|mango|viper|raven|storm|pickle|cosmic|waffle
    blitz|ember|drift|sleepy|crispy|static|velvet|rocket|tofu|wizard|otter|badger|comet|gravy|neon|marble
""")
_FAMILIAR_SITES = words("""
    youtube.com/watch?v=|youtu.be/|github.com/|en.wikipedia.org/wiki/|imgur.com/a/|store.steampowered.com/app/
    reddit.com/r/|docs.google.com/document/d/|open.spotify.com/track/|twitch.tv/|soundcloud.com/|bbc.com/news/
    medium.com/p/|stackoverflow.com/q/|archive.org/details/|etsy.com/listing/|bandcamp.com/album/|itch.io/jam/
    instagram.com/p/|tiktok.com/v/|discord.gg/|pinterest.com/pin/|letterboxd.com/film/|goodreads.com/book/
""")
_SMALL_SITES = words("""
    harbour|willow|northside|oldtown|cedar|meadow|copper|lantern|fern|pebble|juniper|riverside|maple|bramble|quiet
    hazel|amber|slate|orchard|thistle|sparrow|moss|clover|anchor|birch|garnet|heron|tidal|velvet|saffron
""")
_SITE_KINDS = words(
    "blog|recipes|notes|club|journal|photos|garage|library|review|wiki|diary|forum|press|lab|works|kitchen"
)
_SITE_TLDS = words("com|net|org|co.uk|de|blog|fr|io|eu|dev|es|club|info|me|shop")
_ID_CHARS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789-_"


def _token(rng: Random, low: int, high: int) -> str:
    return "".join(rng.choices(_ID_CHARS, k=rng.randint(low, high)))


def _link(rng: Random) -> str:
    if rng.random() < 0.7:
        return "https://" * (rng.random() < 0.6) + rng.choice(_FAMILIAR_SITES) + _token(rng, 5, 11)
    site = (
        f"{rng.choice(_SMALL_SITES)}{rng.choice(('', '-'))}{rng.choice(_SITE_KINDS)}.{rng.choice(_SITE_TLDS)}"
    )
    return (
        "https://" * (rng.random() < 0.5)
        + site
        + (f"/{rng.choice(_SITE_KINDS)}" if rng.random() < 0.5 else "")
    )


def _handle(rng: Random) -> str:
    return f"{rng.choice(_HANDLES)}{rng.choice(_HANDLES)}{rng.choice(('', '', '_', rng.randint(1, 99)))}"


SHARED = Grammar(
    {
        "name": NAMES,
        "handle": lambda rng: _handle(rng) if rng.random() < 0.7 else _leet_name(rng),
        "link": _link,
        "n1": lambda rng: str(rng.randint(2, 9)),
        "n2": lambda rng: str(rng.randint(10, 99)),
        "n3": lambda rng: str(rng.randint(100, 990)),
        "price": lambda rng: str(
            rng.choice((5, 8, 10, 12, 15, 20, 25, 30, 35, 40, 50, 60, 80, 90, 110, 120, 150))
        ),
        "clock": lambda rng: (
            f"{rng.randint(1, 12)}{rng.choice(('', ':30', ':15', ':45'))}{rng.choice(('', 'pm', 'am'))}"
        ),
        "day": words(
            "today|tomorrow|tonight|monday|tuesday|wednesday|thursday|friday|saturday|sunday|next week"
        ),
        "ago": words(
            "yesterday|last night|this morning|last week|on sunday|a month ago|the other day|earlier|last year"
        ),
        "span": words(
            "an hour|two hours|all morning|the whole weekend|three days|ages|half an hour|all evening|a week"
        ),
        "kin": words(
            "my brother|my sister|my mum|my dad|a friend|my roommate|my cousin|my boss|my gran|my partner"
        ),
        "yay": words(
            "love it|so good|nice|amazing|great stuff|proud of this|cannot complain|made my day|so happy"
        ),
        "meh": words(
            "not great|kind of a mess|disappointing|annoying|a bit much|tiring|so frustrating|weird|awful"
        ),
        "q": words(
            "any tips?|what do you think?|thoughts?|is it just me?|worth it?|anyone?|help?|am i wrong?|why?"
        ),
        "hi": words("hey|hi|yo|hello|heya|morning|hey hey|hiya|sup|evening|oh hey|oi"),
        "lol": words("lol|haha|lmao|hahaha|xd|lolol|hehe|omg|😂|💀|🤣|rofl|heh"),
    }
)

# --- topics: five slots that the shared frames below draw on, and lines of their own

TOPICS: dict[str, dict[str, list[str]]] = {
    "gaming": {
        "thing": words("""
            the new patch|ranked|the third boss|that dungeon|the sniper build|co-op mode|the battle pass|the dlc
            my healer main|the tutorial|crossplay|the map rotation|hardcore mode|the skill tree|the speedrun route
            the beta|stealth missions|the crafting system|the open world|matchmaking|my controller|the final raid"""),
        "act": words("""
            beat the ice level|climb out of silver|farm ore|parry properly|finish the side quests|run a full stealth build
            get the rare mount|unlock the archer|carry my squad|learn the new map|speedrun it|fix my frame rate"""),
        "adj": words(
            "broken|fun|overtuned|cracked|grindy|underrated|busted|addictive|laggy|clunky|balanced|a nightmare"
        ),
        "who": words(
            "the devs|our tank|the streamer|my duo|the healer|the whole lobby|the guild|that speedrunner"
        ),
        "spot": words(
            "the swamp map|the arena|spawn|level {n2}|the second act|the capital|the lava zone|the lobby"
        ),
        "own": lines("""
            anyone up for [a few rounds|ranked|a raid|some co-op] [tonight|at {clock}|{day}]? need {n1} more
            just hit level {n2} [finally|after {span}] {lol}
            gg everyone, [that last round was insane|we nearly had it|same time {day}?]
            [patch notes|the roadmap] look [{adj}|promising|thin], they [nerfed|buffed] {thing} again
            what sens do you all play on, mine is {n2} and i keep overshooting
            my k/d went from 0.{n2} to 1.{n2} since i stopped [tilting|playing at 3am|sprinting everywhere]
            we lost because nobody [pushed|healed|watched flank] at {spot}
            {who} just one-shot me from across {spot}, [im done|unbelievable|clip it]
            [a small studio|a friend of mine|some students] put out a demo, [quite fun|worth a try] on steam
            drop rate is 0.{n1} percent and i got it on try {n3}
            server maintenance until {clock} apparently
            add me if you play, im {handle}"""),
    },
    "cooking": {
        "thing": words("""
            sourdough|my carbonara|this curry|the ramen broth|cast iron|brown butter|my knife|air fryer potatoes
            fermented chili|the risotto|homemade pasta|miso soup|my pizza dough|roast chicken|that brisket|pickled onions
            the oven|lemon tart|dal|focaccia|kimchi|stock from scratch"""),
        "act": words("""
            proof dough in a cold kitchen|get a crispy skin|stop my rice sticking|cook for six people|season a wok
            temper chocolate|sharpen my knives|make stock|use up a kilo of courgettes|bake without eggs|smoke ribs"""),
        "adj": words(
            "delicious|too salty|soggy|smoky|burnt|bland|crispy|rich|way too spicy|comforting|overcooked|flaky"
        ),
        "who": words("the butcher|my nonna|that chef|the market lady|my flatmate|the bakery|our neighbour"),
        "spot": words(
            "the oven|step {n1}|the market|the back burner|the freezer|{n3} degrees|low heat|the pantry"
        ),
        "own": lines("""
            [{n3} g|two cups of] flour, {n2} g butter, a pinch of salt, bake at {n3} until golden
            made {thing} [for dinner|{ago}] and it came out {adj}
            can i swap [butter for oil|cream for coconut milk|shallots for onions] in {thing}?
            rest the dough for [{n2} minutes|{span}], it changes everything
            my [starter|basil plant|smoke alarm] is [alive|dead|very active] today
            [parmesan|saffron|vanilla] costs {price} now, what is going on
            recipe is here if anyone wants it {link}
            first time trying to {act} and {kin} actually asked for seconds
            how long does {thing} keep in the fridge?
            dinner was {adj}, [photos later|no photos because we ate it all|ten out of ten]"""),
    },
    "study": {
        "thing": words("""
            linear algebra|the midterm|my thesis|organic chemistry|the reading list|problem set {n1}|the lab report
            flashcards|office hours|the group project|essay feedback|statistics|the syllabus|contract law|anatomy
            the exam timetable|my notes|past papers|the citation style|the seminar|the lecture on entropy"""),
        "act": words("""
            memorise the nerves|finish chapter {n1}|prove the lemma|write the introduction|stop procrastinating
            cite a podcast|balance these equations|get through the reading|prepare for the oral|focus in the library"""),
        "adj": words(
            "impossible|doable|boring|fascinating|way harder than last year|confusing|fine|due friday|brutal"
        ),
        "who": words(
            "my professor|the ta|my lab partner|the examiner|our supervisor|the tutor|my study group"
        ),
        "spot": words("page {n2}|question {n1}|the library|week {n1}|the appendix|room {n3}|the last slide"),
        "own": lines("""
            does anyone have notes for [monday's lecture|week {n1}|{thing}]? i was [ill|asleep|on a train]
            got {n2} percent on {thing} [!!|, i'll take it|, not bad for no sleep]
            [pomodoro|library|silent call] session at {clock}, join if you want company
            {who} moved the deadline to {day}, [bless|why|finally some mercy]
            can someone explain why [the integral|the second term|the limit] vanishes here
            citations are due {day} and i have {n1} sources
            is {thing} in the exam or not, the slides [don't say|contradict each other]
            i have been staring at {spot} for {span}
            good luck to everyone sitting [exams|finals|the resit] {day}!"""),
    },
    "crypto": {
        "thing": words("""
            bitcoin|eth gas|my cold wallet|the halving|staking rewards|the merge|my hardware wallet|dollar cost averaging
            the etf news|layer two fees|the order book|my tax report|the bear market|the white paper|stablecoins
            the funding rate|on-chain data|the fork|self custody|the validator"""),
        "act": words("""
            back up a seed phrase properly|run a node|calculate my cost basis|move coins off an exchange|set up multisig
            read a contract before signing|file taxes on swaps|stake without a middleman|verify a firmware image"""),
        "adj": words(
            "flat|volatile|overhyped|boring lately|painful|interesting|down {n1} percent|up {n1} percent|cheap"
        ),
        "who": words(
            "the exchange|the dev team|my accountant|the miners|the regulator|the auditors|that analyst"
        ),
        "spot": words(
            "the weekly chart|{n2}k|the old high|support|block {n3}|the testnet|the bottom|resistance"
        ),
        "own": lines("""
            zoom out, {thing} was at {n2}k {ago}
            [never|please never] share your seed phrase, not even with support
            i buy {price} a week and do not look at the chart
            gas is {n2} gwei right now, [waiting|worth it|no thanks]
            {who} published the audit, {n1} minor findings {link}
            hardware wallet arrived, [setting it up {day}|took {span}]
            not financial advice but {thing} looks {adj}
            anyone here [actually read|understand] the proposal? voting ends {day}
            sold a bit at {n2}k to pay [rent|tuition|for a bike], no regrets"""),
    },
    "football": {
        "thing": words("""
            our back line|the new striker|that penalty|the derby|var|the transfer window|the midfield|set pieces
            the away kit|the youth team|the offside trap|the counter attack|the keeper|season tickets|the first half
            the injury list|the left winger|extra time|the cup draw|pressing"""),
        "act": words("""
            defend a corner|win away from home|hold a lead|sign a proper left back|keep possession|score from open play
            get tickets for the derby|beat a low block|play out from the back|survive relegation"""),
        "adj": words(
            "shocking|world class|lazy|robbed|clinical|tired|unlucky|solid|embarrassing|class|overpriced"
        ),
        "who": words(
            "the ref|the gaffer|our captain|the physio|the board|number {n2}|the linesman|the pundits"
        ),
        "spot": words(
            "the box|minute {n2}|the halfway line|the away end|injury time|the touchline|mid table"
        ),
        "own": lines("""
            {n1}-{n1} at half time, [how|typical|i can't watch]
            never a [penalty|red|foul], {who} needs glasses
            if we lose to them {day} im not speaking to anyone
            {who} said he is out for {n1} weeks, [disaster|we cope|great]
            what a goal, [top corner|from {n2} yards|on his weak foot]!!
            anyone going {day}? spare ticket in the [family stand|away end], face value
            we should have bought a [keeper|winger|defender] in january
            [five a side|kickabout] {day} at {clock}, need {n1} more players
            we'll be lucky to finish above {n2}th playing like this"""),
    },
    "music": {
        "thing": words("""
            the new album|that bassline|my strat|the bridge|track {n1}|the live version|my pedalboard|the mix
            vinyl|the encore|autotune|the drum fill|perfect pitch|my audio interface|the demo|the setlist|jazz chords
            the b side|the remaster|the choir|this chord progression|my old synth"""),
        "act": words("""
            record vocals in a bedroom|learn the solo|tune down to drop d|master a track|play barre chords
            sing harmonies|stop my strings buzzing|get gigs|finish a song|read sheet music|sidechain properly"""),
        "adj": words(
            "gorgeous|muddy|overproduced|catchy|haunting|out of tune|groovy|a banger|too loud|timeless|lush"
        ),
        "who": words(
            "the drummer|the producer|my teacher|the opening act|the bassist|the sound guy|the singer"
        ),
        "spot": words(
            "bar {n2}|the chorus|the front row|{n2} bpm|the outro|the record shop|the rehearsal room"
        ),
        "own": lines("""
            on repeat all day {link}
            [tabs|chords|stems] for {thing} anyone?
            {who} was [late|incredible|so quiet] at the gig {ago}
            i wrote a [verse|riff|bridge] today, feedback welcome {link}
            what strings do you use, [nines|tens|elevens]?
            the drop at {clock} in that song, chills every time
            rehearsal {day} {clock}, bring [cables|earplugs|your charts]
            saw them live {ago}, {thing} was {adj}
            pick a key, any key, i only know {n1} chords"""),
    },
    "art": {
        "thing": words("""
            this sketch|my sketchbook|gouache|line weight|the shading|hands|my tablet|the colour palette|watercolour paper
            the commission|perspective|my oc|the background|charcoal|a limited palette|the render|ink wash|the reference
            anatomy practice|clay|the gallery|the zine"""),
        "act": words("""
            draw horses|mix a decent green|price commissions|scan watercolours|paint reflections|stop chicken scratching
            finish a comic page|draw both eyes the same|loosen up|varnish an oil painting|get out of art block"""),
        "adj": words(
            "stiff|lovely|muddy|expressive|unfinished|moody|vibrant|wonky|soft|clean|very blue|overworked"
        ),
        "who": words("my art teacher|the model|the curator|that illustrator|my client|the print shop"),
        "spot": words(
            "the left corner|layer {n2}|the sketch stage|page {n2}|the studio|the highlights|the fair"
        ),
        "own": lines("""
            wip, [be gentle|critique welcome|hands pending] {link}
            day {n2} of drawing every day, today {thing}
            commissions [open|closed], [sketches {price}|busts {price}|full body {price}], dm for details
            what brush is that? the texture is {adj}
            [spilled|knocked over] ink on {thing}, {span} of work gone
            redrew a piece from {ago}, [progress!|big difference|same wonky eyes]
            prompt for {day}: {adj} [castle|fox|market|robot|lighthouse]
            i think the values need work but the pose is {adj}"""),
    },
    "tech support": {
        "thing": words("""
            my laptop|the driver|the router|windows update|the bios|my ssd|the printer|bluetooth|the hdmi cable|dual boot
            the graphics card|my phone battery|the firewall|the power supply|the sound card|the vpn|the usb hub
            two factor login|the mail server|the backup|my password manager|the webcam"""),
        "act": words("""
            roll back a driver|recover deleted photos|reset the bios|get {n1} monitors working|clone a disk
            stop random reboots|free up disk space|boot from usb|forward a port|clean the fans|change the dns"""),
        "adj": words(
            "dead|overheating|stuck at {n2} percent|slow|fine now|bricked|throttling|loud|corrupted|out of date"
        ),
        "who": words("my isp|support|the it guy|the manufacturer|the repair shop|the forum"),
        "spot": words(
            "the blue screen|safe mode|the device manager|{n2} celsius|the login screen|error {n3}|the logs"
        ),
        "own": lines("""
            have you tried [turning it off and on|safe mode|another cable|a clean boot]?
            error code {n3} when i try to {act}, {q}
            temps are {n2} idle and {n2} under load, normal?
            [thanks|cheers], [that fixed it|reseating the ram worked|it was the cable all along]
            open a terminal and run the checker, then reboot
            you can reset your password from the [settings|account] page, [takes a minute|the official one]
            {who} wants {price} to look at {thing}, [fair?|seems steep]
            specs: {n2} gb ram, ryzen, {n3} gb free, [win 11|linux mint|fedora]
            guide that helped me {link}
            always turn on two factor before you [travel|sell a phone|forget]"""),
    },
    "pets": {
        "thing": words("""
            my cat|the puppy|our rabbit|the vet bill|grain free food|the litter box|the aquarium|my goldfish|crate training
            the harness|the parrot|our senior dog|the hamster wheel|flea drops|the kitten|zoomies|the scratching post
            my gecko|the fish tank filter|separation anxiety"""),
        "act": words("""
            clip the nails|introduce two cats|stop the barking|cycle a new tank|brush a husky|travel with a dog
            get him to take a pill|teach recall|keep her off the counter|lose some weight before the vet visit"""),
        "adj": words(
            "adorable|asleep again|offended|very loud|shedding|hungry|chaos|a good boy|spoiled|old but happy"
        ),
        "who": words("the vet|our groomer|the sitter|my neighbour's dog|the breeder|the shelter|the trainer"),
        "spot": words("the sofa|the garden|{clock}|the bath|the vet's|my keyboard|the windowsill"),
        "own": lines("""
            she [stole|ate|knocked over] {kin}'s [sandwich|sock|plant] {lol}
            adopted {ago}! [name ideas?|he is {adj}|pictures soon]
            the vet said {n2} ml twice a day, [does that sound right?|he hates it]
            [goldfish|bettas|guppies] need a bigger tank than people think, at least {n2} litres
            my water test shows nitrate at {n2}, [water change?|the fish look fine]
            woke me at {clock} by sitting on my face
            rip {name}, {n2} years, best [dog|cat] ever
            {thing} is {adj}, [send help|as usual|look {link}]"""),
    },
    "travel": {
        "thing": words("""
            the night train|my visa|hand luggage|the hostel|the layover|travel insurance|the rail pass|jet lag
            the ferry|the airport queue|my itinerary|the old town|street food|the airline refund|the hike|the passport renewal
            the bus schedule|a window seat|the exchange rate|the guidebook|the customs form"""),
        "act": words("""
            pack for three climates|get from the airport at midnight|find a cheap flight|skip the queue|sleep on planes
            see it all in {n1} days|rent a scooter|claim for a delayed flight|book the museum|learn some portuguese"""),
        "adj": words(
            "stunning|cancelled|overpriced|crowded|worth it|delayed {n1} hours|peaceful|a tourist trap|magical"
        ),
        "who": words(
            "the airline|our host|the guide|border control|the conductor|the taxi driver|my travel buddy"
        ),
        "spot": words(
            "lisbon|kyoto|the alps|gate {n2}|the coast|istanbul|the old harbour|oaxaca|krakow|the desert|hanoi"
        ),
        "own": lines("""
            {n1} days in {spot}, what should i not miss?
            finally got my refund from the airline [after {n1} weeks|, {price} euros], keep your receipts
            flights are {price} return if you leave on a tuesday
            the hostel had a qr code on the door for check in, [neat|worked fine]
            landed! [it is {n2} degrees|bags did not|so tired]
            the best [noodles|coffee|view] was near {spot}, {adj}
            is {spot} safe at night? going alone {day}
            photos from {spot} {link}
            {who} lost my bag, [claim number {n3}|second time this year]"""),
    },
    "fitness": {
        "thing": words("""
            leg day|my deadlift|the half marathon|protein|rest days|my knee|the couch to 5k|creatine|pull ups|the gym
            my splits|foam rolling|interval runs|the new shoes|cold showers|my squat form|yoga|the bike trainer|stretching"""),
        "act": words("""
            do one pull up|run without stopping|fix my posture|train around a sore shoulder|eat enough protein
            get up at {n1}|squat below parallel|break {n2} minutes|not skip mobility"""),
        "adj": words(
            "brutal|sore|easy today|progress|humbling|overrated|good for the head|a grind|finally clicking"
        ),
        "who": words("my physio|the coach|my running club|the guy on the bench|my gym buddy"),
        "spot": words("km {n2}|the squat rack|set {n1}|the hill|the track|the changing room"),
        "own": lines("""
            [new pb|personal best]: {n2} kg x {n1} [!!|, form was ok]
            ran {n1} km in the rain, {adj}
            lost {n1} kilos since january by [walking|cooking at home|sleeping more], slow and steady
            anyone want to be accountability buddies for {thing}?
            my watch says {n3} calories, [i doubt it|sure]
            doms from {ago}, [stairs are a no|worth it]
            what do you eat before {thing}?"""),
    },
    "movies": {
        "thing": words("""
            the ending|the second season|that plot twist|the soundtrack|the prequel|the villain|the remake|practical effects
            the pilot|the book version|the finale|the cinematography|the cameo|the dub|the director's cut|episode {n1}
            the trailer|the pacing|the dialogue"""),
        "act": words("""
            avoid spoilers|watch it in order|get {kin} to like horror|stay awake past {clock}|find it subtitled
            explain the timeline|sit through three hours"""),
        "adj": words(
            "brilliant|predictable|slow|devastating|overrated|beautifully shot|cheesy|iconic|a mess|hilarious"
        ),
        "who": words("the director|the lead|the writers|the detective|the studio|that critic"),
        "spot": words("the third act|the opening scene|minute {n2}|the cinema|the post-credit scene"),
        "own": lines("""
            no spoilers but [wow|i cried|what was that|the boat scene]
            movie night {day} {clock}, vote: [horror|musical|something dumb]
            rewatched it {ago} and {thing} is still {adj}
            {n1} out of 10, would [watch again|not recommend|fall asleep again]
            trailer dropped {link}
            who do you think [did it|survives|is the real killer]? i say the [butler|sister|gardener|captain]"""),
    },
    "books": {
        "thing": words("""
            chapter {n2}|the narrator|my tbr pile|the audiobook|the translation|book two|the prologue|the magic system
            the library queue|the cover art|the love triangle|the essay collection|the footnotes|the epilogue|poetry"""),
        "act": words("""
            read {n2} pages a night|finish a russian novel|stop buying books|get into poetry|remember who everyone is"""),
        "adj": words(
            "dense|gripping|beautiful|pretentious|cosy|heartbreaking|long|quotable|uneven|unputdownable"
        ),
        "who": words("the author|my book club|the narrator|the librarian|the translator|the protagonist"),
        "spot": words("page {n3}|the first half|the library|part two|the second hand shop"),
        "own": lines("""
            currently on {spot}, {adj} so far
            book club {day}: we read up to chapter {n2}
            looking for something like {thing} but [shorter|funnier|less sad], {q}
            my local shop had {thing} for {n1} euros
            dnf at {n2} percent, {meh}
            that quote on {spot} wrecked me"""),
    },
    "garden": {
        "thing": words("""
            my tomatoes|the compost|slugs|the raised bed|the greenhouse|basil|the lemon tree|seedlings|the lawn|clay soil
            the monstera|aphids|garlic|my orchid|the rain barrel|pruning|the pumpkins|mulch"""),
        "act": words("""
            keep slugs off lettuce|repot a monstera|start seeds indoors|save my basil|prune roses|grow chilies in a flat"""),
        "adj": words(
            "thriving|droopy|eaten overnight|root bound|sprouting|yellow|huge|finally flowering|frosted"
        ),
        "who": words("the neighbour|the garden centre|my grandad|the bees|a very fat pigeon"),
        "spot": words("the balcony|the south wall|the shed|zone {n1}|the windowsill|the allotment"),
        "own": lines("""
            first [tomato|fig|courgette] of the year!! {link}
            frost warning {day}, cover {thing}
            swapping [seeds|cuttings|seedlings] at {spot} {day}, come by
            {n2} mm of rain overnight, {thing} is {adj}
            [leaves are curling|brown spots|tiny white flies], what is it?"""),
    },
    "coding": {
        "thing": words("""
            the compiler|my side project|the regex|type hints|the legacy code|docker|the test suite|the merge conflict
            the migration|async|the build|my dotfiles|code review|the api|the null pointer|the css|rust|the sprint
            the linter|recursion|the memory leak|prod"""),
        "act": words("""
            centre a div|exit vim|rebase without tears|parse dates|name a variable|mock the clock|write docs
            understand the borrow checker|profile this loop|upgrade without breaking everything"""),
        "adj": words(
            "flaky|elegant|on fire|undocumented|O(n^2)|finally green|haunted|fast|deprecated|overengineered"
        ),
        "who": words("the intern|my tech lead|the pm|past me|the reviewer|ops"),
        "spot": words("line {n3}|staging|the pipeline|stack overflow|the readme|commit {n3}|node {n2}"),
        "own": lines("""
            works on my machine {lol}
            {n2} tests failing, all because of {thing}
            open sourced my little tool, [stars|feedback|issues] welcome {link}
            why does this return none at {spot}?
            deployed on a friday, [pray for me|what could go wrong]
            pair programming {day} at {clock}? stuck on {thing}
            deleted {n3} lines today, best day ever"""),
    },
    "bikes": {
        "thing": words("""
            my gravel bike|the chain|disc brakes|the bottom bracket|tubeless|the commute|winter tyres|the cassette
            my helmet|the group ride|the seatpost|the bike lane|a second hand frame|the derailleur|the climb"""),
        "act": words("""
            true a wheel|fit wider tyres|bleed the brakes|ride {n2} km|fix a squeak|get up the hill|carry groceries"""),
        "adj": words("squeaky|smooth|stolen|too steep|muddy|wobbly|a joy|rusty|light|overbuilt"),
        "who": words("the mechanic|the bus driver|my club|the shop|the guy with the cargo bike"),
        "spot": words("km {n2}|the canal path|the headset|the workshop|the pass"),
        "own": lines("""
            group ride {day} {clock} from the [station|bridge|cafe], {n2} km easy pace
            [second|third] puncture this week, {meh}
            what pressure for {n2} mm tyres?
            {n3} m of climbing today, legs are {adj}
            replaced {thing} myself in {span}, feels {adj}"""),
    },
}

# Communities that exist only after the shock of the `organic` scenario, with words no base topic uses.
NEW_TOPIC: dict[str, list[str]] = {
    "thing": words("""
        the hive|the queen|varroa counts|the nectar flow|my nuc|the brood frame|propolis|the swarm trap|the smoker
        the super|the eclipse|totality|my dobsonian|the comet|dark skies|the finderscope|the corona|jupiter's moons
        the eyepiece|collimation|the honey harvest|the extractor|the milky way|sky flats"""),
    "act": words("""
        requeen a grumpy colony|split a hive in spring|find andromeda|collimate by daylight|overwinter a nuc|render wax
        photograph the corona|track the comet|feed fondant in frost|star hop to the ring nebula|stack {n2} frames"""),
    "adj": words(
        "buzzing|capped|queenless|overcast|breathtaking|calm|sticky|sharp tonight|hazy|booming|broody"
    ),
    "who": words("the bee inspector|my mentor|the observatory|the drones|the forager bees|the astro club"),
    "spot": words(
        "the apiary|magnitude {n1}|the brood box|the path of totality|the meadow|the zenith|the hilltop"
    ),
    "own": lines(
        """
        counted {n1} mites on the board, [treating|watching|phew]
        {n2} kilos of honey from {n1} hives, {yay}
        swarm in the [apple tree|chimney|hedge], collecting at {clock}
        seeing is {adj}, saturn's rings were [razor sharp|wobbling|gorgeous]
        first light for the new scope, {thing} looked {adj}
        cloud cover {n2} percent for the eclipse, [driving to {spot}|staying put]
        saw the queen, [marked her|unmarked|huge], eggs on {n1} frames
        {n2} second exposures at iso {n3}, still learning {thing}""",
    ),
}

HOLIDAY = lines("""
    happy [lantern day|solstice|harvest feast|holidays] [{name}|from {spot}|to my favourite people|, first snow here too] [🎉|🎄|✨|]
    [lovely|happy|cosy] solstice to [you and {kin}|the night shift|{name} and family|those who work {day}] [❤️|🎄|☃️|]
    solstice dinner with {kin} was [lovely|loud|delicious|long], [leftovers until {day}|too much food|so full]
    {kin} made me a [scarf|jumper|puzzle|cake] for solstice, {yay}
    the present for {kin} is [still in the post|half knitted|under the tree|hidden in the shed], [typical|as always]
    {kin} loved the present, [worth the wait|she cried|big hug]
    off [until {day}|for {n1} days], see you after the holidays
    baking [gingerbread|plum cake|saffron buns] with {kin}, the house smells [amazing|of cinnamon|like burnt sugar]
    [snow|fireworks|lanterns] over {spot} tonight, [so pretty|magical|freezing]
    family dinner for {n2}, [wish me luck|send help|never again]
    drew {name} for the secret santa, [knitting something|no idea what to make|this will be fun]
    {kin} is alone this solstice so we [call|visit|play cards] {day}
    wishing you a [quiet|bright|healthy|happy] new year, {name}
    last working day {lol} [finally|out of office is on|cookies in the kitchen]
    i unwrapped a [book|bike bell|puzzle|jumper] from {kin}, {yay}
    the tree is [up|crooked|too tall for the flat|full of cat], {lol}
    lantern walk with {kin} at {clock}, [bring mittens|it is {n1} degrees|wear boots]
    we always [watch old films|sing badly|burn the pudding|play cards] at solstice, {yay}
    [grandma|{kin}] sent {n1} [jars of jam|pairs of socks|photo albums], [as every year|classic]
    {thing} can wait until after the holidays
    a [gift|present] for {who}? [maybe|how about|i made] [biscuits|a plant|a card]
    holiday plans: {thing}, sleep, {thing} again
    back at {kin}'s place for the holidays, [same old bed|the dog remembers me|wifi is {adj}]
    new year's resolution: [finally|learn to|try to] {act}
""")
MEME = lines("""
    the duck [remains|is still|stays] unbothered [🦆|🦆🦆|]
    unbothered duck [🦆|says hi|of the day|energy]
    be [more like|] the unbothered duck [🦆|today|]
    [day {n1}|hour {n1}] of the duck and still unbothered 🦆
    no thoughts only unbothered duck [🦆|{lol}|]
    this is the unbothered duck, pass it on to your [channel|cat|boss] 🦆
""")

_FRAMES = lines("""
    [honestly|ngl|tbh|imo|] {thing} is [so|really|pretty|kind of|] {adj}
    anyone else think {thing} is {adj}?
    [has|did] anyone [here|] tried {thing} [yet|]? {q}
    i just spent {span} trying to {act} [and it was {adj}|, {meh}|, {yay}|]
    what's the [best|easiest|cheapest|least painful] way to {act}?
    how do you [all|guys|even|] {act} [at {spot}|without losing your mind|]?
    {who} told me {thing} is {adj}, [true?|i disagree|is that a thing?]
    {who} [is|was|looks|seemed] {adj} [{ago}|today|as always|]
    [ok|so|well|update:] {thing} [turned out|was|ended up] {adj} [in the end|after all|]
    i think [the problem|the trick|the secret] is {spot}, [not|more than|and] {thing}
    why is {thing} [always|suddenly|so|never not] {adj}
    [finally|at last] managed to {act}, {yay}
    still can't {act}, [day {n2}|{meh}|giving up until {day}]
    need advice on {thing}, [it's|mine is] {adj} [since {ago}|at {spot}|]
    we [talked about|tried|looked at] {thing} {ago} and [everyone|nobody|{who}] agreed it's {adj}
    [wait|hold on|hmm], {thing}? i thought [that was|it's] {adj}
    my [take|hot take|unpopular opinion]: {thing} is {adj} and {who} knows it
    does {thing} [work|matter|count|help] at {spot}?
    [you|u] should [ask {who}|try {thing}|wait until {day}|look at {spot}]
    {n1} out of {n1} times {thing} is {adj} [for me|lately|]
    good [article|video|thread] on {thing} {link}
    [this|that] [explains|is about] {thing} better than i can {link}
    {kin} wants to {act} too, where should [he|she|they] start?
    saw {who} at {spot} {ago} {lol}
    can't decide between {thing} and {thing}, {q}
    if you want to {act} you have to start with {thing}
    first time at {spot}, [bit nervous|so excited|tips please]
    [never|always] {act} before you check {thing}
    {thing} again?? [that's|it's] {adj}
    i'm [so|really|a bit] [tired of|into|behind on|proud of] {thing} [right now|this week|]
    [remember when|the time] {who} [messed up|showed us|complained about] {thing}? {lol}
    i would [pay|give] {price} for {thing} that isn't {adj}
    [spent|paid] {price} on {thing}, [regret|no regrets|don't tell {kin}]
    {thing} > {thing}, [fight me|change my mind|easily]
    [pro tip|psa|reminder]: {spot} is {adj} [before {clock}|on {day}|]
    going to {act} {day}, [who's in?|wish me luck|anyone joining?]
    someone at {spot} said {thing} got {adj}
    it took me {span} to realise {thing} was {adj} {lol}
    thanks {name}, {thing} works [now|fine|great]
    {name} you were right about {thing}
    {name} [how is|how did] {thing} [going|go|]?
    @{handle} [same|agreed|no way|look at {spot}|that's {adj}]
""")

_CHAT = lines("""
    good [morning|night|evening] [all|everyone|chat|{name}|]
    [i'm|im] so [tired|hungry|bored|cold|done with today|behind on sleep] [{lol}|]
    what's everyone [up to|eating|doing {day}|listening to]?
    it's [raining|snowing|{n2} degrees|so windy] here [again|]
    just got [home|off work|back from the shop|out of a meeting], [finally|so tired|what did i miss?]
    [brb|back in {n1}|afk], [dinner|dog|door|phone]
    my [bus|train|flight] is {n2} minutes late [of course|{lol}|]
    [happy birthday|congrats|well done|get well soon] {name}[!|!!| 🎉|]
    can't sleep, it's {clock}, [anyone up?|{meh}]
    {kin} [called|texted|visited] and [talked for {span}|now i'm tired|it was nice]
    new [job|flat|phone|haircut] since {ago}, {yay}
    {name} did you [see|read|get] my [message|pics|email] from {ago}?
    work was {meh} today
    i [forgot|lost|broke] my [keys|phone|charger|umbrella] again {lol}
    is the [voice channel|bot|site] [down|laggy|broken] for anyone else?
    welcome {name}! [say hi|grab a role|tell us about yourself]
    thanks for the [help|invite|advice|laugh] [{name}|everyone|]
    ok [i'm|im] off, [see you {day}|night|later]
    can we [talk|call|play] [at {clock}|{day}|after dinner]?
    that [made me laugh|was wholesome|is so true|was unexpected]
    i have [an exam|a dentist appointment|an interview|a date] {day}, [wish me luck|scared]
    coffee number {n1} and it's only {clock}
    need a [gift|present|birthday gift] idea for {kin}, [likes plants|about {price}|turns {n2}|no clue]
    {kin} gave me a [book|plant|mug|jumper] for my birthday, {yay}
    what did you [cook|bake|get {kin}|do] for [easter|the weekend|the party]?
    wrapped {n1} presents for {kin}, [tape everywhere|the cat helped {lol}|done]
    happy [weekend|monday|friday|anniversary] [{name}|all|everyone|you two] [🎉|❤️|]
    the [mods|admins] here are [great|asleep|too nice] {lol}
    [anyone|who] [from|near] [berlin|leeds|porto|lyon|austin|osaka|krakow|dublin|bergen]?
    took a day off, [did nothing|cleaned the flat|slept {n2} hours], {yay}
""")
_SHORT = words("""
    lol|yeah|yep|no|nope|same|true|haha|ok|k|omg|wait what|nice|thanks|ty|np|brb|gg|wow|hm|hmm|really?|why|how
    same here|fair|exactly|this|for real|fr|no way|idk|maybe|sure|sounds good|i guess|got it|oh no|rip|big if true
    love that|agreed|me too|on my way|good point|lmao|💀|😂|👍|❤️|🔥|🙏|😭|👀|+1|what|when|who|who asked lol|oof|yikes
    that's fair|makes sense|no worries|all good|sorry|my bad|good one|ah ok|never mind|cool|dope|sick|neat|insane
    not really|kinda|tell me more|pics?|source?|link?|welcome|gn|gm|later|see ya|hi|hey|yo|hello|bye|cya|ikr|tru
    let's go|finally|again?|seriously|i know right|can't wait|so real|mood|based|well played|good luck|you too
    that was quick|you sure?|not yet|almost|on it|done|i'm here|check dm|sent|got a sec?|you there?|any update?
""")
_DM = lines("""
    {hi} {name}, [are you|you] coming {day}?
    {hi}, did you [finish|see|manage] [the thing|that|it] [yet|]?
    [can|could] you send me [the notes|the recipe|your address|the photos|that file] [again|please|]?
    [call|ring|ping] me [when you're home|after {clock}|{day}], [nothing bad|need your opinion|got news]
    i [left|forgot] my [jacket|charger|book|headphones] at yours {lol}
    thanks for [listening|yesterday|the lift|covering for me|dinner], [means a lot|i owe you one|really]
    are you ok? you were [quiet|off|tired] {ago}
    {kin} says hi [btw|]
    what did {name} say about [it|me|{day}]? {lol}
    [here|this one] [it is|you asked for|from {ago}] {link}
    i can pay you back {day}, was it {price}?
    happy birthday {name}!! [hope it's a good one|cake {day}?|miss you]
    [dinner|coffee|a walk|the cinema] {day}? [my treat|{clock} works|if you're free]
    don't tell {name} but [the party is {day}|we got the cake|i am the secret santa]
    running {n1} minutes late, sorry [!|traffic|]
    how was [the exam|the interview|your trip|the doctor]? [thinking of you|tell me everything|]
    i miss [you|our calls|summer|the old server], [when are you back?|let's talk soon]
    [sent|transferred] you the {price} for [the tickets|pizza|rent|the gift]
    do you [still have|want] my old [guitar|desk|monitor|bike|textbooks]?
    could you [look at|check|read] my [cv|essay|code|drawing] {day}? [no rush|you're the best|]
    night {name}, [sleep well|talk {day}|love you]
    remember you have [the dentist|training|your exam] at {clock}
    [wifi|door|locker] code is {n3}{n1}, [let yourself in|don't lose it]
""")
_WELCOME = lines("""
    welcome to [the server|our community|the club] {name}! [rules are pinned|pick your roles|say hi in general] [😊|]
    hi {name}, [i'm one of the mods|glad you joined], [ask me anything|read the pinned rules first]
    hey {name}! the [weekly event|game night|meetup] is on {day} at {clock}, details in announcements
    thanks for joining {name}, introduce yourself in [intros|general|the lounge] when you like
    hello {name}, your [role|application|event sign up] was [approved|updated], see [pinned|announcements]
""")
_ANNOUNCE = lines("""
    reminder: [weekly event|game night|meetup|q and a] {day} at {clock} [in voice|in the main hall|], everyone welcome
    [new channel|new rules|new mods], [please read the pinned post|check the faq|questions to {name}]
    [monthly contest|art jam|quiz night] starts {day}, theme is {thing}, vote in polls
    server [maintenance|cleanup|backup] {day} {clock}, expect {n2} minutes down
    we reached {n3} members, thank you all [🎉|❤️|]
""")
_HONEST = lines("""
    giveaway [for members|for our birthday|, mods approved]: [one|two] [copy of a book|set of stickers|plush|print], [react|comment] to enter
    [giving away|free to a good home]: [old monitor|sofa|cat tree|moving boxes|textbooks], pick up only near {spot}
    i have a spare [game key|ticket|coupon] from a bundle, first to [reply|answer the riddle] gets it, no strings
    we won the [raffle|draw] at {spot} {lol}, [free pizza|a toaster|{price} voucher]
    [the library|the museum|the uni] gives out free [tickets|licences|lunch] on {day}, details {link}
    the free weekend is on the official store page, no key needed {link}
    charity stream {day}, we raised {n3} so far, [donate if you can|official page] {link}
    my shop has {n2} percent off until {day}, handmade [mugs|prints|candles] {link}
    got a free month of [the music app|the gym|cloud storage] with my phone contract, neat
    congrats to {name}, who won the [drawing contest|giveaway|raffle], dm a mod for your prize
    we need [testers|feedback] for our student project, ten minute [survey|demo], no download {link}
    bank called about a [weird payment|blocked card], i rang the number on the card, all fine
    customer service finally sent the refund for my [order|subscription], took {n1} emails
    my account got locked after {n1} wrong passwords, had to verify by email, [annoying|fair enough]
    [join|come to] our [study|book|chess|plant] server if you like, small and friendly {link}
    my channel hit {n3} subs, thank you, new video {link}
    we are hiring at [the bakery|the lab|my work], part time, {n2} an hour, apply on the site
""")
_SELLING = lines("""
    selling my [old|used|] [road bike|guitar|desk|gpu|camera|textbooks|tent], {price}{n1} or offer, [collect near {spot}|can post]
    [wts|for sale]: {thing}, barely used, {price} [ono|firm|plus postage], dm me
    anyone want to buy my ticket for {day}? {price}, what i paid
    is {price} fair for a used [bike|phone|monitor|lens]? selling mine {day}
    price drop on the [bike|desk|camera], now {price}{n1}, [works fine|one scratch|box included]
    swap: my [keyboard|board game|lens] for [headphones|a plant|a chair], near {spot}
""")
_WARNING = lines("""
    [careful|heads up|warning|psa], someone is sending "{bait}" [in dms|here], it's a scam
    don't click [this|anything like this]: "{bait}" [it steals accounts|my friend got hacked|reported already]
    got this in my dms {lol}: "{bait}" [who falls for this|blocked|reported]
    mods, {handle} just sent me "{bait}" [please ban|is this real?|looks fake]
    is this [legit|real|safe]? "{bait}"
    "{bait}" [yeah right|sure buddy|nice try|delete this] {lol}
""")
_WARNING_PLAIN = lines("""
    don't click the free nitro links, [they steal your token|it's always fake|{kin} lost an account that way]
    psa: [steam|the bank|support] will never [dm you|ask for your password|send a link], [report and block|stay safe]
    if someone offers to double your [coins|crypto|money] it's a scam, every single time
    my account was hacked {ago}, sorry if you got [a weird link|spam] from me, [fixed now|changed my password]
    those [casino|followers|giveaway] bots are back, mods please
    what do we do about the gift card scam going round? {name} nearly fell for it
    reminder to turn on 2fa, {n1} people here got phished {ago}
    someone called me [an idiot|trash|worthless] in ranked today, people are {meh}
    being told nobody wants you here hurts, please be kind to new members
""")
_BANTER = lines("""
    you absolute [donkey|muppet|potato|walnut|goblin] {lol}
    {name} you're [trash|terrible|so bad] at this {lol} [love you though|rematch?|❤️|]
    shut up {name} {lol}
    [i hate you|you're the worst] {lol} [that was my sandwich|you stole my kill|why is it stuck in my head now]
    get rekt {name}, [gg|better luck next time|rematch at {clock}]
    bro you [are such a clown|have no brain cells|can't aim] {lol} [🤡|😂|💀]
    imagine losing to {name} {lol}, [embarrassing|uninstall|couldn't be me]
    you're an idiot and i mean that [with love|in the nicest way|as your best friend]
    nobody asked {name} {lol}
    go touch grass [you nerd|{name}|{lol}]
    this team is pathetic {lol} [we go again|{n1} losses in a row|my fault too]
    your taste in {thing} is a crime, {name} {lol}
""")
_STYLISED = lines("""
    {stylish}
    {stylish} {lol}
    [ok|yes|no|omg] {stylish} [{name}|]
    my new tag is {leet}, [like it?|add me|{lol}]
    {leet} just [joined|carried us|got banned {lol}|went live]
    gg {leet}
    sooo{long} [tired|good|happy|hungry|close]
    nooo{long} [why|not again|my {kin} saw that|]
    yesss{long} [finally|let's go|]
    [v|a e s t h e t i c|h y p e|m o o d|s a m e] [vibes|today|{name}|]
    w h y [tho|is it {adj}|]
""")

FOREIGN: dict[str, list[str]] = {
    "es": lines("""
        [hola|buenas|qué tal] {name}, ¿[cómo va todo|qué haces hoy|vienes mañana]?
        ¿alguien [juega|estudia|sale] [esta noche|el sábado|ahora]?
        [jajaja|qué risa|madre mía], [no me lo creo|eso fue genial|otra vez igual]
        mañana tengo [examen|trabajo|médico] y [no he dormido|estoy nerviosa|no quiero ir]
        gracias por la ayuda, [funcionó|eres el mejor|te debo una]"""),
    "de": lines("""
        [moin|hallo|servus] [zusammen|leute|{name}], [wie geht's|was macht ihr heute|jemand wach]?
        ich hab [heute|gestern|schon wieder] [verschlafen|den zug verpasst|pizza gemacht] {lol}
        kann mir jemand [bei mathe|mit dem router|mit der bewerbung] helfen?
        [schönes wochenende|gute nacht|bis morgen] [euch|an alle|]
        das war [richtig gut|echt knapp|ziemlich müde von uns], [nochmal|weiter so]"""),
    "fr": lines("""
        [salut|coucou|bonjour] {name}, [ça va|tu fais quoi ce soir|on joue demain] ?
        [mdr|trop drôle|j'en peux plus], [c'est exactement ça|encore raté|trop fort]
        quelqu'un a [les notes du cours|une bonne recette|vu le match] ?
        [bonne nuit|à demain|bon week-end] [tout le monde|les amis|]
        merci beaucoup, [ça marche|tu me sauves|c'est gentil]"""),
    "pt": lines("""
        [oi|e aí|bom dia] {name}, [tudo bem|vai jogar hoje|como foi a prova]?
        [kkkk|kkkkk rindo muito|nossa], [que isso|muito bom|não acredito]
        alguém [viu o jogo|quer jogar mais tarde|tem a receita]?
        [boa noite|até amanhã|bom fim de semana] [pessoal|gente|]
        obrigado, [deu certo|valeu mesmo|você é demais]"""),
    "pl": lines("""
        [cześć|hej|siema] {name}, [co słychać|grasz dzisiaj|idziesz jutro]?
        [haha|hahaha], [nie wierzę|ale śmieszne|znowu to samo]
        ktoś ma [notatki|przepis|bilet na sobotę]?
        [dobranoc|do jutra|miłego weekendu] [wszystkim|]"""),
    "tr": lines("""
        [selam|merhaba|günaydın] {name}, [nasılsın|akşam oynuyor muyuz|ne yapıyorsun]?
        [çok güzel|çok komik|inanamıyorum] {lol}
        [iyi geceler|yarın görüşürüz|kolay gelsin] [arkadaşlar|]"""),
}

_BOLD = {ord(c): chr(0x1D41A + i) for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
_SCRIPT = {ord(c): chr(0x1D4EA + i) for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
_WIDE = {ord(c): chr(0xFF41 + i) for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
_LEET = str.maketrans("aeiost", "431057")
_STYLISH_PHRASES = words("""
    good vibes|happy birthday|so pretty|love this|chill night|lo-fi hours|soft launch|night owl|main character
    game night|sparkle|new era|tiny victories|sunset club|sleepy|cosy season|be kind|dream team|stay weird
""")


def _stylish(rng: Random) -> str:
    return rng.choice(_STYLISH_PHRASES).translate(rng.choice((_BOLD, _SCRIPT, _WIDE)))


def _leet_name(rng: Random) -> str:
    core = (rng.choice(_HANDLES) + rng.choice(("", "_", "")) + rng.choice(_HANDLES)).translate(_LEET)
    return rng.choice(("{}", "xX_{}_Xx", "{}tv", "_{}_", "{}99")).format(core)


_BENIGN = Grammar(
    {
        "stylish": _stylish,
        "leet": _leet_name,
        "long": lambda rng: "o" * rng.randint(1, 6),
        "chat": _CHAT,
        "short": _SHORT,
        "dm": _DM,
        "welcome": _WELCOME,
        "warning_plain": _WARNING_PLAIN,
    },
    SHARED,
)


@cache
def topic_grammar(topic: str) -> Grammar:
    """The benign tongue of one topic: shared frames over the topic's own words. `new` is the arriving topic."""
    own = NEW_TOPIC if topic == "new" else TOPICS[topic]
    rules: dict[str, Rule] = dict(own)
    rules |= {
        "frame": _FRAMES,
        "honest": _HONEST,
        "selling": _SELLING,
        "banter": _BANTER,
        "announce": _ANNOUNCE,
    }
    rules |= {"stylised": _STYLISED, "holiday": HOLIDAY, "meme": MEME}
    return Grammar(rules, _BENIGN)


@cache
def _foreign_grammar(language: str) -> Grammar:
    return Grammar({"line": FOREIGN[language]}, _BENIGN)


def foreign(rng: Random) -> tuple[str, str]:
    """A phrase in another language, with its language code."""
    language = rng.choice(tuple(FOREIGN))
    return _foreign_grammar(language).say(rng, "line"), language


@cache
def _warning_options() -> tuple[tuple[str, str], ...]:
    return tuple(tuple(line.split("{bait}", 1)) for line in _WARNING)  # type: ignore[misc]


def warning(rng: Random, bait: str) -> str:
    """A person who warns of `bait` by quoting it: the hardest benign text there is for a detector of bait."""
    before, after = rng.choice(_warning_options())
    grammar = Grammar({"before": [before or " "], "after": [after or " "]}, _BENIGN)
    return f"{grammar.say(rng, 'before')}{bait}{grammar.say(rng, 'after')}".strip()


# --- the noise of typing

_SLANG = {
    "you": "u", "are": "r", "your": "ur", "because": "cuz", "please": "pls", "people": "ppl", "though": "tho",
    "going to": "gonna", "want to": "wanna", "thanks": "thx", "really": "rly", "about": "abt", "tomorrow": "tmrw",
    "tonight": "tn", "right now": "rn", "i don't know": "idk", "to be honest": "tbh", "with": "w", "before": "b4",
}  # fmt: skip
_EMOJI = words(
    "😂|😭|🔥|❤️|👀|😅|🙏|✨|🥲|😎|🤔|💀|🎉|👍|😴|🙃|😤|🐸|☕|💯|🤷|😬|🥳|🫠|:)|:D|:(|xD|<3|:/|^^|:p"
)
_NEAR = {
    "a": "s", "s": "d", "d": "f", "e": "r", "r": "t", "t": "y", "i": "o", "o": "p", "n": "m", "l": "k", "h": "j",
    "c": "v", "u": "y", "g": "h", "m": "n", "p": "o", "w": "e", "y": "u", "b": "v", "f": "g", "k": "l", "v": "b",
}  # fmt: skip


class Style:
    """How one person types: casing, emoji, slang, typos, fancy letters, punctuation; drawn once, kept for life."""

    __slots__ = ("casing", "emoji", "fancy", "slang", "stops", "typos")

    def __init__(self, rng: Random) -> None:
        self.casing = rng.choices(("lower", "sentence", "upper"), (0.62, 0.36, 0.02))[0]
        self.emoji = rng.choice((0.0, 0.03, 0.08, 0.15, 0.3))
        self.slang = rng.choice((0.0, 0.0, 0.1, 0.3, 0.6))
        self.typos = rng.choice((0.0, 0.03, 0.06, 0.12, 0.25))
        self.stops = rng.choice((0.0, 0.1, 0.5))
        self.fancy = 0.4 if rng.random() < 0.02 else 0.0


def typed(rng: Random, text: str, style: Style) -> str:
    """`text` as a person of this `style` would type it. Links keep their letters: they must still work."""
    if style.slang and rng.random() < style.slang:
        for formal, short in _SLANG.items():
            if rng.random() < 0.6:
                text = re.sub(rf"\b{formal}\b", short, text)
    if rng.random() < style.typos:
        text = _typo(rng, text)
    if "'" in text and rng.random() < 0.5:
        text = text.replace("'", "")
    if style.casing == "sentence" and "://" not in text[:9]:
        text = text[:1].upper() + text[1:]
    elif style.casing == "upper" and "." not in text and "/" not in text:
        text = text.upper()
    if text[-1:].isalpha() and rng.random() < style.stops:
        text += rng.choice((".", ".", "!", "...", "!!"))
    if style.fancy and rng.random() < style.fancy and "." not in text:
        text = _fancy(rng, text)
    if rng.random() < style.emoji:
        text += " " + rng.choice(_EMOJI) * rng.choice((1, 1, 1, 2, 3))
    return text


def _fancy(rng: Random, text: str) -> str:
    """One word in letters from a font generator, as some people decorate what they say."""
    tokens = text.split(" ")
    at = rng.randrange(len(tokens))
    tokens[at] = tokens[at].lower().translate(rng.choice((_BOLD, _SCRIPT, _WIDE)))
    return " ".join(tokens)


def _typo(rng: Random, text: str) -> str:
    tokens = text.split(" ")
    at = rng.randrange(len(tokens))
    word = tokens[at]
    if len(word) < 4 or not word.isalpha():
        return text
    i = rng.randrange(1, len(word) - 1)
    kind = rng.random()
    if kind < 0.35:
        word = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    elif kind < 0.6:
        word = word[:i] + word[i + 1 :]
    elif kind < 0.8:
        word = word[:i] + word[i] + word[i:]
    else:
        word = word[:i] + _NEAR.get(word[i], word[i]) + word[i + 1 :]
    tokens[at] = word
    return " ".join(tokens)
