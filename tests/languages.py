"""Ordinary sentences in many languages and scripts, written for this project: what must be left as it is."""

# ruff: noqa: E501  (a language a line)

from __future__ import annotations

SENTENCES: dict[str, tuple[str, ...]] = {
    "English": (
        "Hey, are you coming to the match at 7pm? Channel 4, row b2b... (mp3 of it, U.S.A. only!)",
        "Meet me at the café near gate 12; I'll bring the naïve one.",
        "She said it's fine, so let's go tomorrow.",
    ),
    "French": (
        "Où est la bibliothèque ? C'est déjà l'été, garçon - voilà « ça »",
        "Le cœur a ses raisons que la raison ne connaît point.",
        "Je t'appelle dès que j'arrive à la gare, d'accord ?",
    ),
    "German": (
        "Größe, Straße, Äpfel und Öl für fünf Übungen",
        "Könntest du mir bitte das Buch über Vögel mitbringen?",
        "Wir treffen uns um 20 Uhr am Bahnhof.",
    ),
    "Spanish": ("¿Dónde está el niño? ¡Mañana será otro día!", "El pingüino comió jamón en Logroño."),
    "Portuguese": ("Não há pão nem maçãs, só limões.", "Amanhã às três no café, está bem?"),
    "Italian": ("Perché no? È già lunedì, caffè e città.", "Vieni a cena da noi sabato sera?"),
    "Swedish": ("Räksmörgås på ön är väldigt gott.", "Vi ses på måndag klockan åtta."),
    "Polish": ("Zażółć gęślą jaźń", "Czy możesz mi pomóc przenieść łóżko jutro wieczorem?"),
    "Czech": ("Příliš žluťoučký kůň úpěl ďábelské ódy.", "Uvidíme se zítra večer u řeky."),
    "Hungarian": ("Árvíztűrő tükörfúrógép", "Holnap reggel elutazunk a nagyszüleimhez."),
    "Romanian": ("Știi unde este cheia de la mașină?", "Mâine dimineață mergem împreună la piață."),
    "Turkish": ("Işık ılık süt iç, çocuğun adı İbrahim", "Yarın akşam sinemaya gidelim mi?"),
    "Azerbaijani": ("Sabah görüşərik, mən səni gözləyəcəyəm.", "Bu kitab çox maraqlıdır."),
    "Vietnamese": ("Tiếng Việt được viết bằng chữ Quốc ngữ", "Ngày mai bạn có rảnh không? Mình đi ăn phở nhé."),
    "Hausa": ("Ina kwana? Ƙasar mu tana da kyau ƙwarai.", "Yaro ya ɗauki littafi daga ɗaki."),
    "Icelandic": ("Það er gott veður í dag, er það ekki?", "Ég þarf að kaupa mjólk og brauð."),
    "Russian": (
        "Привет, как дела? Съешь ещё этих мягких французских булок, да выпей чаю. USBшка и СССР",
        "Завтра в семь вечера встречаемся у метро, не опаздывай!",
        "Она купила новый iPhone и сразу позвонила маме.",
    ),
    "Ukrainian": ("Її об'єднання - це ґанок і їжак", "Приїжджай до нас на вихідні, будемо раді."),
    "Bulgarian": ("Утре ще ходим на планина, ако времето е хубаво.", "Моля те, обади ми се довечера."),
    "Serbian": ("Љубав и ћутање иду заједно.", "Видимо се сутра испред школе."),
    "Kazakh": ("Қалың қалай, досым? Ертең кездесейік.", "Бұл кітап өте қызықты екен."),
    "Greek": ("Γεια σου Κόσμε, τι κάνεις; Ωραία μέρα", "Αύριο το πρωί θα πάμε στη θάλασσα."),
    "Armenian": ("Բարեւ աշխարհ, ինչպես ես", "Վաղը երեկոյան կհանդիպենք այգում։"),
    "Georgian": ("გამარჯობა მსოფლიო", "ხვალ საღამოს შევხვდეთ პარკში."),
    "Hebrew": ("שלום עולם, מה שלומך היום?", "מחר בערב ניפגש ליד התחנה ב-8."),
    "Arabic": ("مرحبا بالعالم كيف حالك اليوم", "سنلتقي غدا في الساعة السابعة مساء أمام المكتبة."),
    "Persian": ("سلام، می‌خواهم به خانه‌ی شما بیایم", "فردا هوا خوب است، برویم کوه."),
    "Urdu": ("آپ کیسے ہیں؟ کل ملتے ہیں۔", "یہ کتاب بہت دلچسپ ہے۔"),
    "Hindi": ("नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय", "कल शाम को हम सब साथ में खाना खाएँगे।"),
    "Bengali": ("আপনি কেমন আছেন? কাল দেখা হবে।", "এই বইটি খুব ভালো লেগেছে।"),
    "Tamil": ("வணக்கம், எப்படி இருக்கிறீர்கள்?", "நாளை மாலை சந்திப்போம்."),
    "Telugu": ("నమస్కారం, మీరు ఎలా ఉన్నారు?", "రేపు సాయంత్రం కలుద్దాం."),
    "Sinhala": ("ඔබට කොහොමද? හෙට හමුවෙමු. ශ්‍රී ලංකාව", "මේ පොත හරිම හොඳයි."),
    "Thai": ("สวัสดีชาวโลก เป็นอย่างไรบ้าง", "พรุ่งนี้เย็นเจอกันที่สถานีรถไฟนะ"),
    "Lao": ("ສະບາຍດີ ເຈົ້າສະບາຍດີບໍ່", "ມື້ອື່ນພົບກັນໃໝ່"),
    "Burmese": ("မင်္ဂလာပါ နေကောင်းလား", "မနက်ဖြန် တွေ့ကြမယ်"),
    "Khmer": ("សួស្តី តើអ្នកសុខសប្បាយទេ", "ស្អែកយើងជួបគ្នា"),
    "Amharic": ("ሰላም፣ እንደምን ነህ?", "ነገ ማታ እንገናኛለን።"),
    "Chinese": ("你好，世界！我们明天见。", "他说：“今天的天气真不错，我们去公园吧。”"),
    "Japanese": ("こんにちは世界！ＡＢＣのＴシャツを３枚ください。「はい」", "明日の午後、カフェで会いましょうか？"),
    "Korean": ("안녕하세요 세계! 오늘 어때요?", "내일 저녁에 같이 밥 먹을래?"),
    "emoji": (
        "I ❤️ this 👨‍👩‍👧 so much 😂😂😂 1️⃣ 🇫🇷 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "👩🏽‍💻 shipping it 🏳️‍🌈🇯🇵🇰🇷 see you ☀️🧑‍🚀",
    ),
}  # fmt: skip
