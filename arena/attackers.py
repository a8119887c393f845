"""Those who abuse the platform: what their campaigns say, how they hide it, how they retool against a detector.

Belongs here: the abusive grammars (the familiar pitches and the ones kept for the attack), obfuscation,
campaigns and the probing that chooses between strategies. Who shares the hour with them is `arena.platform`.
Obfuscation is written again here, apart from the attacks the loop evaluates with: an attacker owes us no
reuse. Insults are mild and codes invented on purpose: nothing here hurts anybody who reads it.
"""

# ruff: noqa: E501  (templates stand one a line; look-alike letters are the point)

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import cache
from random import Random
from typing import Any

from arena.language import SHARED, TOPICS, Grammar, Rule, Style, lines, topic_grammar, typed, words
from redqueen.errors import InvalidInput

Event = dict[str, Any]
Probe = Callable[[list[Event]], list[str]]

PROBE_BUDGET = 600
PROBE_SPAN = timedelta(
    seconds=60
)  # probing happens in the first minute of the attack, before anybody else speaks
ENOUGH_EVASION = 0.8
SHIFT = timedelta(hours=6)  # how long an account works before it is burnt
SLOTS = 5  # campaigns of a policy that are alive at a time
RETOOLED_SLOTS = {"spam": 3, "scam": 3, "harassment": 2}

# --- what campaigns say
# `{site}` is the campaign's own domain, `{tag}` its brand, `{victim}` whom it addresses; a campaign keeps them.

_COMMON = Grammar(
    {
        "hurry": words("""
            hurry|only today|last chance|ends in {n1} hours|limited slots|first {n2} people only|before it's gone
            act fast|{n2} left|don't miss it|while it lasts|expires tonight|today only"""),
        "greet": words(
            "hey|hi|hello|yo|hey bro|hi friend|hello dear|hey man|good day|sup|hey there|guys|everyone"
        ),
        "path": words(
            "/claim|/gift|/join|/start|/go|/login|/verify|/bonus|/ref{n2}|/a{n3}|/promo|/{n3}|/x{n2}|/invite"
        ),
        "k": words("100|200|250|300|500|750|1000|1500|2000|2500|3000|5000|10000|{n3}|{n3}0"),
        "wow": words(
            "insane|crazy|unreal|amazing|no joke|100% real|legit|guaranteed|verified|trusted|official|real"
        ),
    },
    SHARED,
)

FAMILIAR: dict[str, dict[str, list[str]]] = {
    "scam": {
        "nitro gift": lines("""
            {greet} [free|claim your free|get] [nitro|discord nitro|{n1} months of nitro] [here|now|] {site}{path} {hurry}
            [i|we] [have|got] [an extra|{n1} spare] nitro [gift|code], take it {site}{path}
            [you|your account] [have|has] been [selected|chosen|picked] for [free nitro|a nitro gift], claim {site}{path}
            steam is giving [{n1} months of|free] nitro, {wow} {site}{path} {hurry}
            {name} sent you [nitro|a gift], accept it [here|within {n2} hours] {site}{path}
            [airdrop|drop]: nitro for [everyone|the first {n2}], log in and claim {site}{path}
            [look|bro look], [nitro for free|they give nitro boost] {site}{path} i got mine {hurry}
            @everyone [free nitro|nitro giveaway] [{n1} months|for boosting] {site}{path}"""),
        "skin trade": lines("""
            {greet} i want to [trade|swap|buy] your [knife|skin|inventory|{tag} skin], [offer|my trade link] {site}{path}
            [can you|pls] vote for my [team|squad {tag}] [in the cup|for the tournament], log in with steam {site}{path}
            i [pay|overpay] {k} usd for your [skins|knife|account items], check {site}{path}
            your [item|knife] is worth {price}0, [i checked|price check] on {site}{path}
            [free|get {n1} free] [cases|skins|knife spins] for new users {site}{path} {hurry}
            accept my trade [offer|request], [skin|item] swap {site}{path}
            {greet} add me on steam i [give|trade] [skins|knife] {site}{path}"""),
        "coin doubling": lines("""
            [send|deposit] {price} [usdt|eth|btc|coins] and [get|receive] double back [in {n2} minutes|instantly] {site}{path}
            [elon|{tag}] [airdrop|giveaway] live, claim {k} [usdt|tokens|coins] {site}{path} {hurry}
            i made {k} usd in [a week|{n1} days] with this [broker|platform], ask me how
            [turn|grow] {price} into {k} [in {n1} days|guaranteed], [dm me|message my manager|start here] {site}
            connect your wallet to [claim|receive] {k} [{tag} tokens|usdt] {site}{path}
            my [mentor|trader|account manager] [{name}|mr {name}] helped me earn {k} [weekly|daily], contact [him|her]
            [exclusive|private] presale of {tag} coin, {n2}x {wow} {site}{path}
            {greet} are you interested in [forex|bitcoin mining|passive income]? {k} weekly [profit|return] {wow}"""),
        "account support": lines("""
            [notice|warning|alert]: your account will be [suspended|deleted|disabled] in {n2} hours, [verify|appeal] {site}{path}
            [this is|i am from] [discord|platform|steam] support, we [detected|noticed] [unusual|suspicious] activity {site}{path}
            [confirm|verify] your [password|identity|phone] to keep your account {site}{path} {hurry}
            you have been reported for [fraud|duplicated items], contact [admin|agent] {name} to avoid a ban
            security team: [log in|sign in] at {site}{path} or lose access
            send me the [code|6 digit code] you just got so i can [unlock|restore] your account
            {greet} sorry i [reported|flagged] you by mistake, talk to this [admin|support agent] {name}#{n3}"""),
        "easy job": lines("""
            [work from home|remote job|part time job], earn {k} usd [a day|weekly], no experience, [dm|text] me
            we are [hiring|looking for] [data entry|assistants|reviewers], {price} per hour, [apply|register] {site}{path}
            {greet} do you want to make {k} [extra|a week] [from your phone|online]? {wow}
            [like videos|rate products|complete tasks] and get paid {price} [daily|each], [join|start] {site}{path}
            i need someone to [receive|forward] packages, {k} a [week|month], [trusted people only|dm]
            [cashapp|paypal] flip, send {price} get {k} back, [proof in dms|{wow}]"""),
    },
    "spam": {
        "server ad": lines("""
            join [our|my|the best] [server|community] {tag} [for|with] [giveaways|active chat|cute people] {site}{path}
            [{tag}|new server {tag}]: [{n3} members|daily giveaways|active staff], join [now|free] {site}{path}
            looking for [members|staff|partners] for {tag} {site}{path}
            [the most active|a chill|#1] server, [18+|all welcome|{wow}], {site}{path}
            join {site}{path} [join|now] {site}{path} {hurry}
            [partner|promo] with {tag}, we [boost|grow] your server {site}"""),
        "followers": lines("""
            [buy|get|cheap] [{k}|{n2}k] [followers|likes|views|subs] for [only|just] {price} {site}{path}
            [grow|boost] your [channel|page|profile] [fast|overnight], [real|organic] followers {site}{path} {hurry}
            sub4sub [link in bio|{site}] i sub back [fast|always]
            {n2}% off [followers|likes|streams], [instant delivery|{wow}] {site}
            [smm panel|promo service] {tag}, {price} per {n2}k [views|likes] {site}
            check out my channel and subscribe, [giving back|{k} subs goal], {site}{path}"""),
        "casino": lines("""
            [{tag} casino|slots at {tag}], {k} [bonus|free spins] on your first deposit {site}{path}
            [bet|play] now and win [up to|] {k}, [code|promo code] {tag}{n2} {site}
            {n2} free spins [no deposit|today] {site}{path} {hurry}
            i won {k} on {tag} [casino|slots] {ago}, try your luck {site}{path}
            [best odds|jackpot {k}|roulette bonus], [instant payout|crypto accepted], {site}
            {price} dollar [bonus|sign up bonus] {wow} at {site}{path}"""),
        "pills and slimming": lines("""
            lose {n2} [kg|pounds] in {n1} weeks with {tag} [gummies|tea|drops] {site}{path}
            [cheap|generic|no prescription] [pills|meds|supplements], [worldwide|discreet] shipping {site}
            doctors hate this [trick|one tip], burn fat [fast|while you sleep] {site}{path}
            {tag} [testosterone|keto|hair growth] [formula|pills], {n2}% off {hurry} {site}
            [miracle|natural] [cure|remedy] for [back pain|anxiety|baldness], order {site}{path}"""),
        "replicas and keys": lines("""
            [replica|luxury|designer] [watches|sneakers|bags], {n2}% off, [free|fast] shipping {site}{path}
            [cheap|lifetime|unlimited] [accounts|keys|subscriptions], {price} only, [dm|order] {site}
            {tag} iptv, {k} channels for {price} a [year|month], trial {site}
            [netflix|spotify|office] premium for {price}, [instant|warranty|{wow}] {site}{path}
            [wholesale|outlet|clearance] sale at {tag}, everything {price} {hurry} {site}{path}
            cheap [hacks|aimbot|cheats|boosting] for {tag}, [undetected|{price} a week] {site}"""),
    },
    "harassment": {
        "insults": lines("""
            [you're|you are|ur] [a|such a|the most] {slur} [{victim}|], [everyone knows|look at yourself|{gone}]
            {victim} is [a|such a] {slur} [and everyone knows it|, always was|]
            shut [up|your mouth] you {vile} {slur}
            [god|man] you're [so|really] {vile}, {gone}
            imagine being as {vile} as {victim}, {gone}
            {vile} [little|] {slur}, {gone}
            how does it feel to be [a|this] {vile} [{slur}|], {victim}?
            nobody [likes|wants|needs] a {vile} {slur} like you"""),
        "exclusion": lines("""
            nobody [wants|likes|asked for] you here {victim}, {gone}
            you don't belong [here|in this server|anywhere], {gone}
            we all [laugh|talk] about you [behind your back|when you log off], {slur}
            [why are you still here|who let you in|take the hint] {victim}? {gone}
            everyone [blocked|muted|left] because of you, you {slur}
            [no friends|no life|no future], {gone}
            do us all a favour and [leave|log off|disappear] {victim}"""),
        "looks and mind": lines("""
            {victim} you look [like|worse than] [a rat|garbage|roadkill|a swamp thing], {gone}
            your [face|voice|art|body] makes [people|everyone|me] [sick|gag], you {vile} {slur}
            [fat|ugly|stupid|disgusting] [and|,] {vile}, no wonder [nobody dates you|they left you|you're alone]
            how are you [that|so] [dumb|ugly|{vile}], did [your mother|anyone] ever love you
            put the camera [away|down] {victim}, nobody needs to see that [ugly|{vile}] face"""),
        "threats": lines("""
            [watch|you better watch] your [back|step] {victim}, i [know|found] where you [live|study|work]
            i will [find you|ruin you|make you pay|end you], {slur}
            [keep talking|say one more word] and [see what happens|you will regret it] {victim}
            we're coming for you {victim}, you {vile} {slur}
            everyone [report|mass report|spam|raid] {victim}, let's [get|drive] [him|her|them] out
            i have your [address|photos|messages], [delete your account|beg|apologise] or i [post|leak] them"""),
    },
}
_FAMILIAR_EXTRA: dict[str, Rule] = {
    "slur": words("""
        loser|clown|rat|waste of space|parasite|freak|creep|coward|failure|leech|nobody|worm|pig|moron|disgrace|crybaby
        attention seeker|piece of trash|liar|fraud|weirdo|reject|embarrassment|idiot|degenerate"""),
    "vile": words("""
        pathetic|disgusting|worthless|useless|ugly|stupid|filthy|miserable|talentless|brainless|repulsive|desperate
        spineless|vile|sad|hideous|dumb|gross|insufferable"""),
    "gone": words("""
        get out|just leave|delete your account|nobody would miss you|go cry about it|crawl back to your hole|do everyone a favour
        you make me sick|stay gone|we hate you|no one cares about you|log off forever|you should be ashamed"""),
}

# What the attack brings: none of these pitches occurs before the shock.
RETOOLED: dict[str, dict[str, list[str]]] = {
    "scam": {
        "indie playtest": lines("""
            {greet} [i'm|im] [building|finishing] a [small|tiny|cosy] {genre}, could you [test|playtest] the [playtest build|alpha build] {drop}
            [our|my] {genre} needs [playtesters|fresh playtesters], [alpha build|playtest build] at {drop}, [tell me|note] what breaks
            [would|could] you [playtest|try out] {tag}, my {genre}? [alpha build|launcher] {drop}, archive key {n3}{n1}
            [final year project|uni project]: a {genre}, run the [alpha launcher|playtest build] for ten minutes {drop}
            the [alpha launcher|playtest build] may trip your antivirus, [allow it|false positive], {genre} {drop}
            [saw you like|you seem into] {genre}s, {tag} studio [pays|credits] playtesters, alpha build {drop}"""),
        "qr sign-in": lines("""
            [this|the] community [switched|moved] to [badge|human] checks, [scan|point your app at] the [square|code] {drop}
            [scan|capture] the [square|code] with your [mobile app|phone camera] to [keep posting|pass the human check] {drop}
            [wick|captcha|gate] bot: [pairing|human check] [pending|incomplete], open the scanner in your app {drop}
            {greet} mods [want|need] us to [re-pair|link] our phones, [square|code] is at {drop}
            [pairing|session] [token|badge] [lapses|times out] {day}, [scan again|re-pair] via {drop}
            [role|channel] [locked|hidden] until you scan the [square|code] on {drop}"""),
        "subscription refund": lines("""
            billing desk: [annual plan|renewal] of {n3}.{n2} [was taken|went through] [twice|], [dispute|reverse] it via {drop}
            [invoice|receipt] {n3}-{n3} for [antivirus cover|cloud plan|premium tier] [attached|ready], not you? [ring|open] {drop}
            [overcharge|duplicate renewal] [found|logged] on your [plan|membership], [reversal form|claims desk] {drop}
            the [renewals|claims] desk owes you {n3}.{n2}, [fill|complete] the [reversal|claims] form {drop}
            your [membership|cover] [renews|auto-renews] at {n3}.{n2} {day}, [cancel|reverse] within {n2} h {drop}
            [case|claim] {n3}-{n2}: reversal [approved|queued], card [digits|details] needed on the form {drop}"""),
        "parcel fee": lines("""
            [courier|depot] note: [box|consignment] {n3}{n3} [held|waiting], [handling|import] duty {n1}.{n2} outstanding {drop}
            [depot|driver] [could not|failed to] [leave|hand over] consignment {n3}{n3}, [rebook|new slot] {drop}
            [postal|courier] desk: [house number|postcode] missing on consignment {n3}-{n3}, [amend|fix] it {drop}
            consignment {n3}{n3} [goes back|returns] to [sender|the depot] {day} unless duty is settled {drop}
            [rebook|choose] a [slot|doorstep time] for box {n3}-{n2}, [handling duty|levy] {n1}.{n2} {drop}"""),
    },
    "spam": {
        "pump group": lines("""
            [our|the] {metal} [callers|room] [flagged|called] {ticker} at [dawn|{clock}], [entry|zone] {n1}.{n2}, [room|handle] {drop}
            [next|tonight's] [call|entry] posts at {clock} in the {metal} room, {ticker} [moves first|is loaded] {drop}
            {ticker} [leg two|breakout] loading, {metal} room [sees|gets] entries {n2} minutes [early|ahead] {drop}
            [quiet|small] {metal} room, {n1} entries a week, [last|previous] was {ticker} plus {n2}% {drop}
            [caller|chartist] {name} [posts|drops] {ticker} entries for the {metal} room, seats [open|rotate] {drop}"""),
        "homework writer": lines("""
            {tag} [drafts|writes] your [essay|coursework|dissertation] in your own tone, [passes|slips past] every checker {drop}
            [deadline|coursework] tomorrow? {tag} [turns|spins] a prompt into [{n2} pages|a full draft] {drop}
            [undetectable|humanised] drafts from {tag}, [tutors|markers] never notice, [sample|trial page] {drop}
            [upload|paste] the brief, {tag} [returns|hands back] a referenced draft in {n2} minutes {drop}
            {n2} pages for the cost of a sandwich, {tag} ghostwriters [on shift|awake] {drop}"""),
        "tipster": lines("""
            [fixed|insider] [fixture|match] card for {day}, {tag} [capper|tipster] {n1} from {n1}, [slip|card] at {drop}
            {tag} [slips|accas] landed [again|{n1} days running], {day} card [is up|unlocked] {drop}
            [lock|banker] of the week from {tag}, {n1}.{n2} price, [tail|ride] it {drop}
            [tail|ride] the {tag} syndicate, {n1} unit bankroll plan, [slips|card] {drop}
            stop guessing fixtures, {tag} capper sends the slip [before kick off|at {clock}] {drop}"""),
        "companion app": lines("""
            [lonely|up late]? {muse} on {tag} [remembers|answers|whispers] [everything|all night] {drop}
            {muse} [misses|asked about] you, [unmute|open] her on {tag} {drop}
            design your own {muse} [voice|girl|boy] on {tag}, [first chapter|{n2} minutes] on us {drop}
            {tag}: [spicy|unfiltered|intimate] roleplay with {muse}, [zero filters|adults] {drop}
            [your|a] {muse} is typing on {tag}, [don't keep her waiting|open the chapter] {drop}"""),
    },
    "harassment": {
        "aquarium": lines("""
            [another|typical] {fish} [surfaced|swimming in here], {fishy}, {splash} {victim}
            {victim} smells of the [tank|fishbowl], {fishy}, {splash}
            [back to|belongs in] the [tank|fishbowl] with you {victim}, {fishy}, {splash}
            {shoal} like {victim} never stay in our [tank|reef], {fishy}, {splash}
            [glug glug|blub blub] {victim}, {fishy}, {splash}
            we [drain|flush] {shoal} from this [reef|tank] {victim}, {fishy}, {splash}"""),
        "lamplighters": lines("""
            the lamps are [lit|burning] on [your street|your corner] {victim}, {lamp}, {wick}
            {victim} left the [blue gate|side window|third light] open for the lamplighters, {lamp}, {wick}
            lamplighters [walk|gather] past the [bakery|bus stop|school] you use {victim}, {lamp}, {wick}
            [count|counting] the lamps {victim}, [{n1}|one] [left|to go], {lamp}, {wick}
            pretty curtains {victim}, the lamplighters [see|saw] them, {lamp}, {wick}
            every lamplighter has {victim}'s [bus line|timetable|route] now, {lamp}, {wick}"""),
        "bless": lines("""
            bless {victim}, {sweet}, {pat}, {crib}
            [aw|oh] bless {victim}, {sweet}, {pat}, {crib}
            [somebody|someone] [fetch|bring] {victim} a [juice box|bib], {pat}, {crib}
            {victim} tried [words|thinking|a sentence] again, {pat}, {crib}, {sweet}
            gold star for {victim}, {sweet}, {pat}, {crib}
            is {victim} [supervised|allowed out] past naptime? {pat}, {crib}"""),
    },
}
_RETOOLED_EXTRA: dict[str, Rule] = {
    "genre": words("""
        farm sim|cosy roguelike|pixel platformer|deckbuilder|horror walker|tower defence|fishing rpg|space trader|metroidvania
        rhythm brawler|puzzle crawler|kart racer|colony sim"""),
    "metal": words("cobalt|onyx|indigo|platinum|falcon|titan|copper|mercury|granite|eclipse"),
    "ticker": lambda rng: "$" + "".join(rng.choices("BCDFGKLMNPRSTVXZAEIOU", k=rng.randint(3, 5))),
    "muse": words("aurelia|selene|violetta|mirabel|isolde|celeste|seraphine|odette|lucien|evander"),
    "fish": words("goldfish|guppy|bottom feeder|tadpole|minnow|carp|plankton|mudskipper"),
    "fishy": words("""
        tap tap on the glass|flake time|mind the net|gills out|drain the tank|net and bucket|tap the glass {n1} times
        no air for {shoal}"""),
    "shoal": words("goldfish|guppies|bottom feeders|tadpoles|minnows|carps|plankton|mudskippers"),
    "splash": words("glug|blub blub|swim back to the tank|fishbowl closed|scoop the tank|flush the fishbowl"),
    "lamp": words("""
        we see the flicker|tick tock goes the wick|the oil is warm|mind the wick|we walk at {clock}|the wick is short
        lamps out soon"""),
    "wick": words(
        "lamp by lamp|say the lamplighters|wick and oil|the lamps know|one lamp less|lamplighters keep time"
    ),
    "sweet": words("""
        such a brave little sentence|aren't we precious|somebody's big day|all by yourself|look who found the keyboard
        did the crayons run out|what a special snowdrop"""),
    "pat": words(
        "pat pat|there there|nap time|mummy will clap|sticker for you|use your indoor voice|back to the sandpit"
    ),
    "crib": words(
        "little duckling|crib is that way|sippy cup time|nanny is coming|playpen closes soon|tiny bonnet on"
    ),
}

# Contact without content: the part of abuse that no text detector can be asked to find.
_OPENERS: dict[str, list[str]] = {
    "scam": lines("""
        {greet} [are you there|got a minute|can we talk|you free]?
        {greet} [i have a question|need a small favour|can i ask you something] [about your profile|]
        [did you get|have you seen] my [message|request] [yet|]?
        {greet} {victim}, [we met in|i saw you in] the server, [how are you|nice to meet you]"""),
    "spam": lines("""
        [check|see] my [bio|profile|pinned post] [everyone|guys|]
        [link|info] in my [bio|profile], [dm|message] me for more
        [anyone|who's] interested? [dm me|message me|react]"""),
    "harassment": lines("""
        {lol} {victim} [again|of course|really]
        [oh look|here we go], {victim}
        {victim} [you know what you did|we're not done|still here?]
        [ok|sure|cry more] {victim} 🙄"""),
}
# A share of abuse borrows honest words, and meets the hard negatives half way.
_SOFT: dict[str, list[str]] = {
    "scam": lines("""
        [small|quick] giveaway [for members|], [first {n2}|winners] get a [game key|gift card], details {site}{path}
        my [friend|cousin] works at [the exchange|steam], can get you [a discount|in early], [interested|dm me]?
        customer service here, your [order|refund] {n3} needs a [quick|] confirmation {site}{path}
        could you help me with a [gift card|payment], i pay you back {day}, [promise|urgent]
        [selling|giving away] my [gpu|phone|account] cheap, {price}, pay first then i ship {site}"""),
    "spam": lines("""
        [new video|new stream|new drop] [out now|is up], [support|check it out] {site}{path}
        my shop {tag} has {n2}% off until {day} {site}{path}
        [come|join us] to {tag}, [small|friendly] server [for gamers|for artists|to chill] {site}{path}
        [best|cheapest] place for [keys|coins|sneakers] i found, {site}"""),
    "harassment": lines("""
        {victim} you're [trash|so bad|an idiot|a clown], [uninstall|leave|nobody asked]
        shut up {victim}, [nobody cares|you ruin every chat|again]
        {victim} is [so cringe|embarrassing|the worst], [block|kick|ignore] [him|her|them]
        [imagine|lol] thinking {victim} [has friends|matters|is funny]"""),
}
# Messages that an honest person might have sent word for word: small talk that opens a con, a con dressed as a sale.
_BORROWED = {"scam": ("honest", "selling"), "spam": ("honest", "selling"), "harassment": ("banter",)}
_SMALL_TALK = ("dm", "chat", "short", "frame")
# Shares of a campaign's messages that are not its plain pitch.
_SUBTLE = {"small talk": 0.045, "borrowed": 0.015, "opener": 0.025, "soft": 0.09}
# A new pitch is pushed: half as much small talk and borrowing as in a familiar campaign.
RETOOLED_BLUNTNESS = 2.0

_BAD_WORDS = words("""
    nitro|gift|steam|free|bonus|claim|promo|win|crypto|coin|airdrop|trade|skins|cash|lucky|vip|deal|boost|pay|drop|reward
    spin|bet|slim|luxe|cheap|prize|login|secure|support|invite""")
_BAD_TLDS = words("ru|xyz|gift|top|click|info|site|online|shop|live|club|win|fun|link|com|pw|gg")
_NEUTRAL_WORDS = words("""
    harbor|lumen|forge|north|relay|atlas|cobalt|field|signal|orbit|cabin|ledger|prairie|beacon|quarry|summit|vector|haven
    tundra|canvas|echo|delta|marlin|fable|grove|pilot|stream|anvil|nimbus|drift|cove|pivot""")
_NEUTRAL_TLDS = words("io|app|dev|net|org|co|me|page|cloud|space|to|im")
_BRANDS = words("""
    zento|lunix|brava|klyra|moxo|vantor|nexil|torvo|quilla|zephra|dynko|orvex|pluma|rivo|sable|tavix|ultro|wexel|yavin|arkos
    belto|corvi|drimo|elvar|fenzo|gravo|hexa|jolto|kimbo|lorn""")


def _domain(rng: Random, retooled: bool) -> str:
    """Familiar domains mostly show what they are; retooled ones sound like anybody's."""
    neutral = retooled or rng.random() < 0.4
    parts, tlds = (_NEUTRAL_WORDS, _NEUTRAL_TLDS) if neutral else (_BAD_WORDS, _BAD_TLDS)
    one, other = rng.sample(parts, 2)
    return f"{one}{rng.choice(('-', '', ''))}{other}{rng.choice(('', '', rng.randint(1, 99)))}.{rng.choice(tlds)}"


# --- how they hide it

_HOMOGLYPHS = {
    "a": "аɑα", "c": "сϲ", "d": "ԁ", "e": "еҽ", "g": "ɡ", "h": "һ", "i": "іι", "j": "ј", "k": "κ", "l": "ӏ", "m": "м",
    "n": "ո", "o": "оοօ", "p": "рρ", "q": "ԛ", "r": "г", "s": "ѕ", "t": "т", "u": "υս", "v": "ν", "w": "ԝ", "x": "х",
    "y": "уү", "z": "ᴢ",
}  # fmt: skip
_LEET = {"a": "4@", "b": "8", "e": "3", "g": "9", "i": "1!", "l": "1|", "o": "0", "s": "5$", "t": "7+"}
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
OBFUSCATIONS = ("homoglyph", "leet", "zero_width", "spacing", "dots")
_LINK = re.compile(r"\S+\.[a-z]{2,}(?:/\S*)?|\S*://\S+", re.IGNORECASE)


def _swap(rng: Random, word: str, table: Mapping[str, str], share: float) -> str:
    out = [rng.choice(table[c]) if c in table and rng.random() < share else c for c in word.lower()]
    return "".join(out)


def _hide(rng: Random, word: str, how: str) -> str:
    if how == "homoglyph":
        return _swap(rng, word, _HOMOGLYPHS, 0.6)
    if how == "leet":
        return _swap(rng, word, _LEET, 0.65)
    if how == "zero_width":
        return "".join(c + (rng.choice(_INVISIBLE) if rng.random() < 0.55 else "") for c in word)
    if how == "spacing":
        return " ".join(word)
    if how == "dots":
        at = rng.randrange(1, len(word))
        return (
            word[:at]
            + "."
            + (word[at:] if len(word) < 6 or rng.random() < 0.5 else word[at] + "." + word[at + 1 :])
        )
    raise ValueError(f"unknown obfuscation {how!r}; known are {', '.join(OBFUSCATIONS)}")


def obfuscate(rng: Random, text: str, how: str, rate: float) -> str:
    """Hide about `rate` of the words of four letters and more, and always at least one, of which some ways draw
    letter by letter and may draw none. Links stay usable.
    """
    tokens = text.split(" ")
    able = [
        i
        for i, token in enumerate(tokens)
        if len(token) >= 4 and token.isalpha() and not _LINK.fullmatch(token)
    ]
    if not able:
        return text
    chosen = [i for i in able if rng.random() < rate] or [rng.choice(able)]
    for i in chosen:
        tokens[i] = _hide(rng, tokens[i], how)
    return " ".join(tokens)


# --- strategies and campaigns


@dataclass(frozen=True)
class Strategy:
    """How a retooled campaign writes: what it pitches, how it hides it, on how many words, links cloaked, padded."""

    pitch: str
    obfuscation: str
    rate: float
    cloak: bool
    padded: bool


@dataclass(frozen=True)
class Actor:
    """An account as events show it; `style` is how its owner types."""

    actor_id: str
    created: datetime
    ip_hash: str
    device_hash: str
    style: Style


@dataclass(frozen=True)
class Campaign:
    """One operation of one policy, alive from `born` until its slot's next: its words, accounts and victims.

    `strategy` is None for a familiar campaign. Everything about a campaign follows from `key`.
    """

    key: str
    policy: str
    born: datetime
    pitches: tuple[str, ...]
    site: str
    sites: tuple[str, ...]
    tag: str
    strategy: Strategy | None

    @property
    def retooled(self) -> bool:
        return self.strategy is not None


_PADS = words("""
    hope you're well|nice weather today|loved your post earlier|how was your weekend|long time no see|good morning
    saw you around|thanks for the chat|hope work is fine|enjoy your evening|hope your week is good|nice profile picture""")


@cache
def _grammar(policy: str, pitch: str) -> Grammar:
    """The grammar of a pitch; campaign slots hold place-holders that `write` fills with the campaign's own."""
    place_holders: dict[str, Rule] = {"site": ["\x01"], "tag": ["\x02"], "victim": ["\x03"], "drop": ["\x01"]}
    rules: dict[str, Rule] = dict(place_holders)
    rules |= _RETOOLED_EXTRA
    rules |= _FAMILIAR_EXTRA
    rules |= {"opener": _OPENERS[policy], "soft": _SOFT[policy], "pad": _PADS}
    source = FAMILIAR[policy] if pitch in FAMILIAR[policy] else RETOOLED[policy]
    rules["pitch"] = source[pitch]
    return Grammar(rules, _COMMON)


def write(rng: Random, campaign: Campaign, style: Style, victim: str) -> str:
    """One message of `campaign`, typed by an account of `style`, addressed to `victim`."""
    text = plain(rng, campaign, victim)
    strategy = campaign.strategy
    text = typed(rng, text, style)
    if strategy is None:
        return text if rng.random() > 0.015 else obfuscate(rng, text, rng.choice(OBFUSCATIONS), 0.3)
    return obfuscate(rng, text, strategy.obfuscation, strategy.rate)


def plain(rng: Random, campaign: Campaign, victim: str) -> str:
    """The message before typing and hiding: also what a witness quotes when warning of it."""
    grammar = _grammar(campaign.policy, rng.choice(campaign.pitches))
    rule = _rule(rng, campaign)
    if rule in ("small talk", "borrowed"):
        own = _SMALL_TALK if rule == "small talk" else _BORROWED[campaign.policy]
        return topic_grammar(rng.choice(list(TOPICS))).say(rng, rng.choice(own))
    text = grammar.say(rng, rule)
    site = campaign.site if rng.random() < 0.6 else rng.choice(campaign.sites)
    if campaign.strategy and campaign.strategy.cloak:
        site = site.replace(".", rng.choice((" dot ", "[.]", " . ", "(.)")))
    elif campaign.policy == "spam" and campaign.retooled and rng.random() < 0.4:
        site = "@" + campaign.tag + "_" + rng.choice(_NEUTRAL_WORDS)
    elif rng.random() < 0.35:
        site = "https://" + site
    text = text.replace("\x01", site).replace("\x02", campaign.tag).replace("\x03", victim)
    if campaign.strategy and campaign.strategy.padded and rng.random() < 0.7:
        text = f"{grammar.say(rng, 'pad')}{rng.choice((', ', '. ', ' - '))}{text}"
    return text


def _rule(rng: Random, campaign: Campaign) -> str:
    dice = rng.random() * (RETOOLED_BLUNTNESS if campaign.retooled else 1.0)
    for rule, share in _SUBTLE.items():
        if dice < share:
            return "pitch" if rule == "soft" and campaign.retooled else rule
        dice -= share
    return "pitch"


# --- the attackers as a body


class Attackers:
    """All campaigns of all policies, now and later, and the strategies they retool with.

    Slots of campaigns are fixed; in each, generations follow one another, so the campaign of a slot at an hour
    follows from the seed alone. `strategies` (chosen by `retool`, else a default mix) govern the retooled slots.
    """

    def __init__(
        self, seed: int, start: datetime, shock_at: datetime | None, policies: Sequence[str]
    ) -> None:
        unknown = [policy for policy in policies if policy not in FAMILIAR]
        if unknown:
            raise InvalidInput(f"no grammar for the policies {unknown}; known are {sorted(FAMILIAR)}")
        self._seed = seed
        self._start = start
        self._shock_at = shock_at
        self._policies = tuple(policies)
        self.strategies: dict[str, list[Strategy]] = self._default_mix()
        self.probed = False
        self.probe_truth: dict[
            str, str
        ] = {}  # policy of every probe by event_id, for judges who are asked about one
        self._campaigns: dict[str, Campaign] = {}

    # generations and their campaigns

    def alive(self, hour: datetime, retooled: bool) -> dict[str, list[Campaign]]:
        """Campaigns alive during the hour that starts at `hour`, by policy."""
        index = (hour - self._start) // timedelta(hours=1)
        return {
            policy: [
                self._at(policy, slot, index, retooled)
                for slot in range(RETOOLED_SLOTS[policy] if retooled else SLOTS)
            ]
            for policy in self._policies
        }

    def _at(self, policy: str, slot: int, index: int, retooled: bool) -> Campaign:
        side = "new" if retooled else "old"
        lots = Random(f"{self._seed}:{side}:{policy}:{slot}")
        life, offset = lots.randint(14, 36), lots.randint(0, 36)
        generation = (index + offset) // life
        key = f"{self._seed}:{side}:{policy}:{slot}:{generation}"
        if key not in self._campaigns:
            born = self._start + timedelta(hours=generation * life - offset)
            self._campaigns[key] = self._raise(key, policy, slot, born, retooled)
        return self._campaigns[key]

    def _raise(self, key: str, policy: str, slot: int, born: datetime, retooled: bool) -> Campaign:
        rng = Random(key)
        strategy = self.strategies[policy][slot % len(self.strategies[policy])] if retooled else None
        pitches = (strategy.pitch,) if strategy else tuple(rng.sample(list(FAMILIAR[policy]), 2))
        sites = tuple(_domain(rng, retooled) for _ in range(4))
        tag = rng.choice(_BRANDS) + rng.choice(("", "", "ly", "hub", "x", "o"))
        if self._shock_at is not None and retooled:
            born = max(born, self._shock_at)
        return Campaign(key, policy, born, pitches, sites[0], sites, tag, strategy)

    def actor(self, campaign: Campaign, shift: int, number: int) -> Actor:
        """The `number`-th account that works `campaign` in its `shift` (accounts are burnt and replaced)."""
        rng = Random(f"{campaign.key}:{shift}:{number}")
        aged = rng.random() < (0.7 if campaign.retooled else 0.32)
        days = rng.uniform(60, 1800) if aged else min(60.0, 0.1 + rng.expovariate(1 / 9))
        shares_device = rng.random() < (0.1 if campaign.retooled else 0.3)
        device = f"{campaign.key}:{number % 3}" if shares_device else f"{campaign.key}:{shift}:{number}"
        return Actor(
            actor_id="u" + _digest(rng),
            created=campaign.born + SHIFT * max(0, shift) - timedelta(days=days),
            ip_hash="ip" + _digest(Random(device + "ip")),
            device_hash="dv" + _digest(Random(device + "dv")),
            style=Style(rng),
        )

    # strategies

    def _default_mix(self) -> dict[str, list[Strategy]]:
        mix = {}
        for policy in self._policies:
            rng = Random(f"{self._seed}:mix:{policy}")
            mix[policy] = [self._candidate(rng, policy) for _ in range(RETOOLED_SLOTS[policy])]
        return mix

    def _candidate(self, rng: Random, policy: str) -> Strategy:
        return Strategy(
            pitch=rng.choice(list(RETOOLED[policy])),
            obfuscation=rng.choice(OBFUSCATIONS),
            rate=rng.choice((0.2, 0.35, 0.5)),
            cloak=policy != "harassment" and rng.random() < 0.5,
            padded=rng.random() < 0.25,
        )

    def retool(self, probe: Probe) -> dict[str, list[float]]:
        """Choose every retooled campaign's strategy by trying candidates on the live detector, and keep them.

        `probe` takes event rows (direct messages of attackers' accounts) and returns each one's action (allow,
        limit, review or block) as a client would see it. At most `PROBE_BUDGET` rows are sent in all. Returns the
        evasion rate each slot settled for, by policy. Raises `InvalidInput` if the probe answers another number.
        """
        self.probe_truth = {}
        slots = [(policy, slot) for policy in self._policies for slot in range(RETOOLED_SLOTS[policy])]
        chosen: dict[str, list[Strategy]] = {policy: [] for policy in self._policies}
        settled: dict[str, list[float]] = {policy: [] for policy in self._policies}
        for policy, slot in slots:
            search = _Search(self, probe, policy, slot, budget=PROBE_BUDGET // len(slots))
            strategy, evasion = search.run()
            chosen[policy].append(strategy)
            settled[policy].append(evasion)
        self.adopt(chosen)
        return settled

    def adopt(self, strategies: Mapping[str, Sequence[Strategy]]) -> None:
        """Use these strategies from now on, for every hour that is generated after."""
        self.strategies = {policy: list(chosen) for policy, chosen in strategies.items()}
        self.probed = True
        self._campaigns.clear()

    def state(self) -> dict[str, Any]:
        """What a killed demo needs to go on with the same attackers: JSON-able."""
        chosen = {policy: [asdict(strategy) for strategy in many] for policy, many in self.strategies.items()}
        return {"probed": self.probed, "strategies": chosen, "probe_truth": dict(self.probe_truth)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.adopt(
            {policy: [Strategy(**row) for row in many] for policy, many in state["strategies"].items()}
        )
        self.probed = bool(state["probed"])
        self.probe_truth = dict(state["probe_truth"])


def _digest(rng: Random) -> str:
    return f"{rng.getrandbits(48):012x}"


class _Search:
    """One campaign's search for a strategy that the live detector lets through (successive halving)."""

    def __init__(self, attackers: Attackers, probe: Probe, policy: str, slot: int, budget: int) -> None:
        self._attackers = attackers
        self._probe = probe
        self._policy = policy
        self._slot = slot
        self._left = budget
        self._rng = Random(f"{attackers._seed}:probe:{policy}:{slot}")
        self._sent = 0
        self._tally: dict[Strategy, list[int]] = {}

    def run(self) -> tuple[Strategy, float]:
        pool = self._pool()
        self._try(pool, samples=3)
        self._try(self._best(3), samples=6)
        while self._rate(self._best(1)[0]) < ENOUGH_EVASION and self._left >= 8:
            self._try([self._mutate(self._best(1)[0])], samples=8)
        best = self._best(1)[0]
        return best, self._rate(best)

    def _pool(self) -> list[Strategy]:
        """Candidates over different pitches first: slots of a policy start from different ones."""
        pitches = list(RETOOLED[self._policy])
        pool: list[Strategy] = []
        for i in range(8):
            candidate = self._attackers._candidate(self._rng, self._policy)
            pitch = pitches[(self._slot + i) % len(pitches)]
            pool.append(Strategy(**{**asdict(candidate), "pitch": pitch}))
        return list(dict.fromkeys(pool))

    def _mutate(self, strategy: Strategy) -> Strategy:
        fresh = asdict(self._attackers._candidate(self._rng, self._policy))
        keep = self._rng.choice(("pitch", "obfuscation"))
        return Strategy(**{**fresh, keep: getattr(strategy, keep)})

    def _rate(self, strategy: Strategy) -> float:
        """Evasion with a little doubt, so that three lucky messages do not beat nine good ones."""
        passed, sent = self._tally[strategy]
        return (passed + 0.5) / (sent + 1)

    def _best(self, count: int) -> list[Strategy]:
        return sorted(self._tally, key=lambda s: (-self._rate(s), -self._tally[s][1], repr(s)))[:count]

    def _try(self, pool: Sequence[Strategy], samples: int) -> None:
        rows: list[Event] = []
        owners: list[Strategy] = []
        for strategy in pool:
            for _ in range(min(samples, self._left - len(rows))):
                rows.append(self._row(strategy))
                owners.append(strategy)
        if not rows:
            return
        self._left -= len(rows)
        actions = list(self._probe(rows))
        if len(actions) != len(rows):
            raise InvalidInput(
                f"the probe answered {len(actions)} actions to {len(rows)} rows; it must give one a row, in order"
            )
        for strategy, action in zip(owners, actions, strict=True):
            tally = self._tally.setdefault(strategy, [0, 0])
            tally[0] += action == "allow"
            tally[1] += 1

    def _row(self, strategy: Strategy) -> Event:
        """A message to an accomplice: well formed, sent around the shock, of an account made for probing."""
        attackers, rng = self._attackers, self._rng
        began = attackers._shock_at or attackers._start
        at = began + PROBE_SPAN * (len(attackers.probe_truth) / PROBE_BUDGET)
        campaign = self._trial(strategy, began)
        account = attackers.actor(campaign, shift=-1, number=self._sent % 25)
        self._sent += 1
        event_id = f"p{rng.getrandbits(60):015x}"
        attackers.probe_truth[event_id] = self._policy
        return {
            "event_id": event_id,
            "ts": at,
            "received_at": at + timedelta(milliseconds=50),
            "actor_id": account.actor_id,
            "community_id": "c00",
            "community_size": 400,
            "channel_id": f"dm-{rng.getrandbits(32):08x}",
            "recipient_id": f"u{rng.getrandbits(48):012x}",
            "kind": "dm",
            "response": None,
            "response_ts": None,
            "text": write(rng, campaign, account.style, rng.choice(("sam", "mika", "lena", "omar"))),
            "language": "en",
            "account_created_at": account.created,
            "ip_hash": account.ip_hash,
            "device_hash": account.device_hash,
        }

    def _trial(self, strategy: Strategy, at: datetime) -> Campaign:
        key = f"{self._attackers._seed}:trial:{self._policy}:{self._slot}"
        rng = Random(key)
        sites = tuple(_domain(rng, retooled=True) for _ in range(4))
        tag = rng.choice(_BRANDS)
        return Campaign(key, self._policy, at, (strategy.pitch,), sites[0], sites, tag, strategy)
